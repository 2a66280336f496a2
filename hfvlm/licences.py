"""Which weights may be published, by the licence that came with them."""

UNKNOWN = "unknown"


class LicenceError(PermissionError):
    """Weights that must not be published without a decision of the user."""


def check_licence(licence: str | None, *, accepted: bool) -> None:
    """Let own weights and those of open licences pass; others only if the user says to have read the licence.

    Raises:
        LicenceError: the licence is non-commercial, special ("other") or unknown, and `accepted` is off.
    """
    if accepted or licence is None:
        return
    if "-nc" in licence or licence in (UNKNOWN, "other"):
        raise LicenceError(
            f"The weights' licence is {licence!r}: read what came with them, then say so with accept_licence=True "
            "(--i-have-read-the-licence on the command line)."
        )
