"""Counts what the gateway does, as Prometheus' text format has it (version 0.0.4)."""

from collections import Counter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # seconds


class Seconds:
    """A histogram of durations."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(_BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._sum += seconds
        self._counts[next((i for i, bound in enumerate(_BOUNDS) if seconds <= bound), -1)] += 1

    def lines(self, name: str) -> list[str]:
        """The samples, cumulative."""
        out, seen = [], 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._counts, strict=True):
            seen += count
            out.append(f'{name}_bucket{{le="{bound}"}} {seen}')
        return [*out, f"{name}_sum {self._sum:.6f}", f"{name}_count {seen}"]


class Metrics:
    """Everything since the gateway started."""

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()  # by status
        self.users: Counter[str] = Counter()  # known, null, none
        self.answering = 0  # requests, now
        self.reloads_failed = 0
        self.preparing, self.first_byte = Seconds(), Seconds()

    def text(self, users: int) -> str:
        """
        Args:
          users: in the table.
        """
        described = [
            ("e2p_answers_total", "counter", "Chat requests answered, by HTTP status; 499: the client went."),
            ("e2p_users_total", "counter", "Requests sent on, by whose soft token they had."),
            ("e2p_answering", "gauge", "Requests being answered."),
            ("e2p_table_users", "gauge", "Users in the table."),
            ("e2p_reloads_failed_total", "counter", "New versions of the table that could not be served."),
            ("e2p_prepare_seconds", "histogram", "From a request's last byte until the engine's request is made."),
            ("e2p_first_byte_seconds", "histogram", "From then until the first byte of the engine's answer."),
        ]
        samples = [
            [f'e2p_answers_total{{status="{status}"}} {count}' for status, count in sorted(self.answers.items())],
            [f'e2p_users_total{{token="{token}"}} {count}' for token, count in sorted(self.users.items())],
            [f"e2p_answering {self.answering}"],
            [f"e2p_table_users {users}"],
            [f"e2p_reloads_failed_total {self.reloads_failed}"],
            self.preparing.lines("e2p_prepare_seconds"),
            self.first_byte.lines("e2p_first_byte_seconds"),
        ]
        blocks = [
            [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *lines]
            for (name, kind, what), lines in zip(described, samples, strict=True)
        ]
        return "".join(f"{line}\n" for block in blocks for line in block)
