"""What candidates cost in time, as shares of the dense model's latency."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.costs import DENSE, CostTable
from lrcompile.errors import InvalidInputError
from lrcompile.profiling.survey import Survey, form_of, held_form
from lrcompile.rewrite import Proposal
from lrcompile.sites import LinearSite


@dataclass(eq=False)
class Prices:
    """Measured prices of everything that a site may hold.

    Attributes:
        table: may be replaced by one of another scale while a plan is sought.
        given: the table is the user's: it is not corrected by what is measured here.
    """

    survey: Survey
    table: CostTable
    given: bool = False

    def dense(self, site: LinearSite) -> float:
        """The share of the dense model's latency that the site takes in it."""
        return self.survey.uses[site.name] * self.table.share(self.survey.shapes[site.name])

    def held(self, site: LinearSite) -> float:
        """The share that it takes as it stands, after exact rewrites."""
        form = held_form(site)
        if not form:
            return self.dense(site)
        macs = next(e.macs for e in self.survey.candidates[self.survey.shapes[site.name]] if e.form == form)
        return self.survey.uses[site.name] * self.table.share(self.survey.shapes[site.name], form, macs)

    def of(self, site: LinearSite, proposal: Proposal) -> float:
        """The share that it would take with a proposal."""
        uses = self.survey.uses[site.name]
        share = self.table.share(self.survey.shapes[site.name], form_of(proposal), proposal.cost.macs / uses)
        return uses * share

    def check(self) -> None:
        """Whether the table is one of this model and this batch.

        Raises:
            InvalidInputError: it lacks a shape or a form, or was made for another model.
        """
        for shape, count in self.survey.counts.items():
            self.table.share(shape, DENSE)
            for candidate in self.survey.candidates[shape]:
                self.table.share(shape, candidate.form, candidate.macs)
            held = self.table.counts.get(shape, 0)
            if held and count > held:
                raise InvalidInputError(
                    f"the costs are of a model with {held} products of {shape}, this one has {count}",
                    where="--costs",
                    hint="profile this model",
                )
