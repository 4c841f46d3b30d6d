"""Names of models and data sets on the Hugging Face Hub."""

import dataclasses
import re

_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(\w[\w./-]*))?")


@dataclasses.dataclass(frozen=True)
class HubName:
    """The parts of `owner/name@revision`: a repository, and its branch, tag or commit ("" is the main branch)."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def has_owner(self) -> bool:
        """Whether it is `owner/name`; a few old models have only a name, which may also be a file."""
        return "/" in self.repository


def hub_name(text: str) -> HubName | None:
    """Parses `owner/name` or `owner/name@revision`, whether or not it is on the Hub; None if it is no such name."""
    match = _NAME.fullmatch(text)
    return None if match is None else HubName(match[1], match[2] or "")
