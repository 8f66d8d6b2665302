"""What a run promises about privacy, in sentences; the one home of their wording.

The model card of an exported folder and the page of a run say the same.
"""

from __future__ import annotations

UNITS = {"example": "one training example", "user": "all rows of one user"}
"""What is added or removed between neighbouring data, by ``privacy.unit``."""

UNPROTECTED = {
    "none": "None: the sites' updates were not protected (privacy.mode=none).",
    "dry": "None: ε = ∞. The run was dry, the private path without its noise (privacy.mode=dry).",
}
"""What there is to say where nothing is promised, by ``privacy.mode``."""

GUARANTEE = (
    "What each site released for this model is (ε, δ)-differentially private; noise was added at "
    "the site."
)

ADVERSARY = (
    "It holds against everyone but the site itself: the server, the other sites, whoever submits "
    "jobs, and whoever gets the model. No amplification by client sampling is credited. The ε of "
    "the run is the largest of its sites', never their sum or mean."
)

SCOPE = (
    "The number covers this run, its resumes included, and nothing else: every other run on the "
    "same data adds to it."
)

NOT_COVERED = (
    "Not covered by ε: what is public by declaration (sizes of the sites, label names, validation "
    "split, settings), settings chosen after other runs on the same data, what the base model had "
    "learned before, timing, and that a site failed."
)


def neighbours(unit: str) -> str:
    """Return what the number is about, as part of a sentence.

    Example:
        >>> neighbours("example")
        'neighbouring data differ by adding or removing one training example of one site'
    """
    return f"neighbouring data differ by adding or removing {UNITS[unit]} of one site"
