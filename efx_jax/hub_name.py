"""Names of models and data sets on the Hugging Face Hub."""

import dataclasses
import re

_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(\w[\w./-]*))?")


@dataclasses.dataclass(frozen=True)
class HubName:
    """What `owner/name@revision` says: a repository, and its branch, tag or commit ("" is the main branch)."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def has_owner(self) -> bool:
        """Whether it is `owner/name`; a few old models are a name alone, as a file may be."""
        return "/" in self.repository


def hub_name(text: str) -> HubName | None:
    """Reads `owner/name` or `owner/name@revision`, whether or not the Hub has it; None where it is none."""
    match = _NAME.fullmatch(text)
    return None if match is None else HubName(match[1], match[2] or "")
