"""Deals with records that break their format: the first one ends the reading, or they are skipped and counted."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from e2p_jax.config import OnBadRecord
from e2p_jax.errors import UserError

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")


class BadRecords:
    """The policy of one reading of a dataset, and what it met so far."""

    def __init__(self, policy: OnBadRecord = "error", max_share: float = 0.01, flag: str = "--on-bad-record") -> None:
        """
        Args:
          policy: error: the first bad record is an error; skip: it is left out and counted.
          flag: That sets the policy, for errors.
          max_share: skipping more than this share of a file's records is an error.

        Raises:
          UserError: a share that is not from 0 to 1.
        """
        if not 0 <= max_share <= 1:
            raise UserError(f"max_bad_share is {max_share}; it must be from 0 to 1")
        self.policy, self.max_share, self.flag = policy, max_share, flag
        # By the file's name, which may be read again: how many were skipped, of how many.
        self.files: dict[str, tuple[int, int]] = {}
        self.first = ""  # what was wrong with the first one

    def parse(self, rows: Iterable[Row], parse: Callable[[Row], Parsed], source: Any) -> Iterator[Parsed]:
        """Parses the rows of one file, and leaves out those that `parse` refuses with a `UserError`.

        Args:
          rows: What `parse` takes; where the rows themselves cannot be told apart any more, they raise.
          parse: Of one row.
          source: The file, for errors.

        Raises:
          UserError: a bad row under the policy `error`, or, after the last row, too many of them.
        """
        skipped, total = 0, 0
        for row in rows:
            total += 1
            try:
                parsed = parse(row)
            except UserError as error:
                if self.policy == "error":
                    raise UserError(f"{error} ({self.flag} skip leaves such records out)") from error
                skipped += 1
                self.first = self.first or str(error)
            else:
                yield parsed
        self.files[Path(str(source)).name] = (skipped, total)
        if skipped > self.max_share * total:
            raise UserError(
                f"{source}: {skipped} of {total} records are bad, more than max_bad_share={self.max_share}; "
                f"repair the file or raise it (the first: {self.first})"
            )

    def check(self, files: Mapping[str, tuple[int, int]], source: Any) -> None:
        """Holds what another reading skipped, its `files`, against this policy.

        Args:
          source: The directory that it wrote, for errors.

        Raises:
          UserError: it left out a record under the policy `error`, or too many of a file.
        """
        share = 0.0 if self.policy == "error" else self.max_share
        for name, (skipped, total) in files.items():
            if skipped > share * total:
                raise UserError(
                    f"{source}: prepared without {skipped} of the {total} records of {name}, which are bad; repair "
                    "that file and delete the directory to prepare it anew, or allow it with --on-bad-record skip and "
                    f"--max-bad-share {math.ceil(1000 * skipped / total) / 1000}"
                )

    def report(self) -> str | None:
        """One line on what was skipped, if anything was."""
        skipped, total = (sum(column) for column in zip(*self.files.values(), strict=True)) if self.files else (0, 0)
        return f"skipped {skipped} of {total} records as bad; the first: {self.first}" if skipped else None
