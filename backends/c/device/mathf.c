/* Functions of <math.h> that the compiler's runtime lacks. Largest errors, measured over all floats (or all
 * finite pairs of a grid, for two arguments) by tests/mcu/test_math.py, in units of the last place:
 * erff 1.5, tanhf 1.4, nearbyintf and rintf exact; those that go through double: 0.51. */
#include <math.h>
#include <stdint.h>

static uint32_t bits(float x)
{
    union {
        float f;
        uint32_t u;
    } as;
    as.f = x;
    return as.u;
}

static float from_bits(uint32_t u)
{
    union {
        float f;
        uint32_t u;
    } as;
    as.u = u;
    return as.f;
}

float copysignf(float x, float y)
{
    return from_bits((bits(x) & 0x7FFFFFFFu) | (bits(y) & 0x80000000u));
}

/* To nearest, ties to even: adding 2^23 leaves no room for a fraction. */
float nearbyintf(float x)
{
    float magnitude = fabsf(x);

    if (!(magnitude < 8388608.0f)) {
        return x;
    }
    magnitude = (magnitude + 8388608.0f) - 8388608.0f;
    return copysignf(magnitude, x);
}

float rintf(float x)
{
    return nearbyintf(x);
}

/* Minimax polynomials: erf(x)/x - 1 in x^2 below 1, then erf about the middle of six intervals of length 1/2. */
static const float erf_near[7] = {0.128379167f, -3.76126271e-01f, 1.12836002e-01f, -2.68544455e-02f,
                                  5.18953685e-03f, -8.02085355e-04f, 7.88915766e-05f};
static const float erf_far[6][7] = {
    {0.92290014f, 0.236521214f, -0.295651942f, 0.16752322f, -0.00612411415f, -0.0467786603f, 0.0205129087f},
    {0.986671686f, 0.0527748391f, -0.0923561826f, 0.0901776478f, -0.0481064916f, 0.00596977677f, 0.00905978773f},
    {0.998537302f, 0.00714230025f, -0.0160701238f, 0.0217269603f, -0.0190896951f, 0.0105813826f, -0.00276419357f},
    {0.999899387f, 0.00058629422f, -0.00161227013f, 0.00275820866f, -0.00325759291f, 0.00282581267f, -0.00166910246f},
    {0.999995708f, 2.91936431e-05f, -9.48721499e-05f, 0.000195219531f, -0.00028604921f, 0.000332612719f, -0.000275040715f},
    {0.999999881f, 8.81886194e-07f, -3.3064689e-06f, 7.91175717e-06f, -1.37684337e-05f, 2.0204885e-05f, -2.08734764e-05f},
};

float erff(float x)
{
    float magnitude = fabsf(x);
    const float *c = erf_near;
    float t = x * x;
    float y;
    int interval;

    if (magnitude < 1.0f) {
        y = c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * (c[5] + t * c[6])))));
        return x + x * y;
    }
    if (!(magnitude < 4.0f)) {
        return x != x ? x : copysignf(1.0f, x); /* 1 - erf(4) is a quarter of the last place */
    }
    interval = (int)(magnitude * 2.0f) - 2;
    c = erf_far[interval];
    t = magnitude - ((float)interval * 0.5f + 1.25f);
    y = c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * (c[5] + t * c[6])))));
    return copysignf(y, x);
}

float tanhf(float x)
{
    float magnitude = fabsf(x);
    float t = x * x;
    float y;

    if (magnitude < 0.625f) {
        y = -3.33333325e-01f + t * (1.33333045e-01f + t * (-5.39595261e-02f + t * (2.17708834e-02f + t * (-8.34972e-03f + t * 2.29867e-03f))));
        return x + x * t * y;
    }
    if (!(magnitude < 9.5f)) {
        return x != x ? x : copysignf(1.0f, x);
    }
    return copysignf(1.0f - 2.0f / (expf(2.0f * magnitude) + 1.0f), x);
}

/* The rest is rare in networks, so it is right rather than fast: through double, rounded once. */

float sinhf(float x)
{
    double e;

    if (fabsf(x) < 0.5f) {
        double t = (double)x * (double)x;
        return (float)((double)x * (1.0 + t / 6.0 * (1.0 + t / 20.0 * (1.0 + t / 42.0 * (1.0 + t / 72.0 * (1.0 + t / 110.0))))));
    }
    e = exp((double)x);
    return (float)((e - 1.0 / e) * 0.5);
}

float coshf(float x)
{
    double e = exp(fabs((double)x));
    return (float)((e + 1.0 / e) * 0.5);
}

float expm1f(float x)
{
    if (fabsf(x) < 0.03125f) {
        double t = (double)x;
        return (float)(t * (1.0 + t / 2.0 * (1.0 + t / 3.0 * (1.0 + t / 4.0 * (1.0 + t / 5.0 * (1.0 + t / 6.0))))));
    }
    return (float)(exp((double)x) - 1.0);
}

/* log(1 + t), t in double: the rounding of 1 + t is put back to first order. */
static double log1p_double(double t)
{
    double u = 1.0 + t;

    if (u == 1.0) {
        return t;
    }
    if (u - u != 0.0) { /* infinite or not a number */
        return log(u);
    }
    return log(u) * (t / (u - 1.0));
}

float log1pf(float x)
{
    return (float)log1p_double((double)x);
}

float asinhf(float x)
{
    double t = fabs((double)x);

    if (x - x != 0.0f) {
        return x;
    }
    t = log1p_double(t + t * t / (1.0 + sqrt(t * t + 1.0)));
    return copysignf((float)t, x);
}

float acoshf(float x)
{
    double t = (double)x - 1.0;

    if (x == INFINITY) {
        return x;
    }
    if (x < 1.0f) {
        return NAN;
    }
    return (float)log1p_double(t + sqrt(t * (t + 2.0)));
}

float atanhf(float x)
{
    double t = fabs((double)x);

    return copysignf((float)(0.5 * log1p_double(2.0 * t / (1.0 - t))), x);
}

/* atan on [0, inf): two reductions bring the argument below tan(pi/16), where a short series is exact enough. */
static double atan_positive(double x)
{
    double base = 0.0;
    double sign = 1.0;
    double s;
    double t;

    if (x > 1.0) {
        base = 1.5707963267948966;
        sign = -1.0;
        x = 1.0 / x;
    }
    /* atan(x) = atan(a) + atan((x - a) / (1 + a x)) with tan(pi/8) = sqrt(2) - 1 */
    if (x > 0.19891236737965800) {
        base += sign * (x > 0.66817863791929892 ? 0.78539816339744831 : 0.39269908169872414);
        x = x > 0.66817863791929892 ? (x - 1.0) / (1.0 + x) : (x - 0.41421356237309505) / (1.0 + 0.41421356237309505 * x);
    }
    t = x * x;
    s = 1.0 - t * (1.0 / 3 - t * (1.0 / 5 - t * (1.0 / 7 - t * (1.0 / 9 - t * (1.0 / 11 - t / 13)))));
    return base + sign * x * s;
}

float atanf(float x)
{
    if (x != x) {
        return x;
    }
    return copysignf((float)atan_positive(fabs((double)x)), x);
}

float atan2f(float y, float x)
{
    double angle;

    if (x != x || y != y) {
        return x + y;
    }
    if (y == 0.0f) {
        angle = 0.0;
    } else if (isinf(x) && isinf(y)) {
        angle = 0.78539816339744831;
    } else {
        angle = atan_positive(fabs((double)y) / fabs((double)x));
    }
    return copysignf((float)(signbit(x) ? 3.1415926535897931 - angle : angle), y);
}

float asinf(float x)
{
    double t = (double)x;

    if (fabsf(x) == 1.0f) {
        return copysignf(1.57079637f, x);
    }
    t = sqrt((1.0 - t) * (1.0 + t));
    return t != t ? (float)t : copysignf((float)atan_positive(fabs((double)x) / t), x);
}

float acosf(float x)
{
    double t = (double)x;
    double angle;

    if (fabsf(x) == 1.0f) {
        return x > 0.0f ? 0.0f : 3.14159274f;
    }
    t = sqrt((1.0 - t) * (1.0 + t));
    if (t != t) {
        return (float)t;
    }
    if (x == 0.0f) {
        return 1.57079637f;
    }
    angle = atan_positive(t / fabs((double)x));
    return (float)(x < 0.0f ? 3.1415926535897931 - angle : angle);
}

/* A negative base wants an integer exponent; from 2^24 on every float is even. */
float powf(float x, float y)
{
    double magnitude;
    float sign = 1.0f;

    if (y == 0.0f || x == 1.0f) {
        return 1.0f;
    }
    if (x != x || y != y) {
        return x + y;
    }
    if (signbit(x)) {
        int whole = truncf(y) == y;
        int odd = whole && fabsf(y) < 16777216.0f && ((int32_t)y & 1);

        if (!whole && x != 0.0f && !isinf(x) && !isinf(y)) {
            return NAN;
        }
        sign = odd ? -1.0f : 1.0f;
        x = -x;
    }
    if (x == 1.0f) {
        return sign;
    }
    if (x == 0.0f || isinf(x)) {
        return sign * ((x == 0.0f) == (y > 0.0f) ? 0.0f : INFINITY);
    }
    if (isinf(y)) {
        return (x < 1.0f) == (y > 0.0f) ? 0.0f : INFINITY;
    }
    magnitude = exp((double)y * log((double)x));
    return sign * (float)magnitude;
}
