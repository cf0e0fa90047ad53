/* The part of <math.h> that a bare target has: from the compiler's runtime and from mathf.c. */
#ifndef LRC_MATH_H
#define LRC_MATH_H

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF (__builtin_inff())
#define isnan(x) __builtin_isnan(x)
#define isinf(x) __builtin_isinf(x)
#define isfinite(x) __builtin_isfinite(x)
#define signbit(x) __builtin_signbit(x)

/* from the compiler's runtime */
float ceilf(float), cosf(float), exp2f(float), expf(float), fabsf(float), floorf(float), fmaf(float, float, float);
float fmaxf(float, float), fminf(float, float), fmodf(float, float), log10f(float), log2f(float), logf(float);
float roundf(float), sinf(float), sqrtf(float), tanf(float), truncf(float);
double exp(double), fabs(double), floor(double), log(double), sqrt(double);

/* from mathf.c */
float acosf(float), acoshf(float), asinf(float), asinhf(float), atan2f(float, float), atanf(float), atanhf(float);
float coshf(float), erff(float), expm1f(float), log1pf(float), nearbyintf(float), powf(float, float);
float rintf(float), sinhf(float), tanhf(float), copysignf(float, float);

#endif
