"""TFDS builder of PENS: news headlines for a reader."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from e2p_jax.datasets.builder import RecordBuilder, RecordConfig
from e2p_jax.datasets.pens.release import NAMES, Article, read_impressions, read_news, read_rewrites
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """The way in which impressions become records."""

    context: int = 50
    """Clicked headlines in a record: the last ones."""
    body_words: int = 300
    """Words of the article in the prompt."""
    targets: int = 1
    """Clicked headlines asked for, an impression; the first ones."""
    question: str = "Write a headline for this article."
    """Stands before the article."""

    def validate(self) -> None:
        """
        Raises:
          UserError: naming the option that is out of range.
        """
        for name in ("context", "body_words", "targets"):
            if getattr(self, name) < 1:
                raise UserError(f"pens: option {name} must be 1 or more")
        if not self.question.strip():
            raise UserError("pens: option question must not be empty")


class Builder(RecordBuilder):
    """Splits: `train` and `validation`, the next headline that a user clicked; `test`, the headlines that 103 users
    wrote themselves, which are the records' references too.

    All records of a user have one context, the history of the user's first impression, so that it can stand for the
    user's one vector. A clicked headline that is part of it is not asked for.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        RecordConfig(name="headlines", description="Article in the prompt, headline as the answer.", options=Options()),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"{', '.join(NAMES)}, from https://msnews.github.io/pens.html"

    def _info(self) -> tfds.core.DatasetInfo:
        return self._record_info(
            description="Headlines that readers of Microsoft News clicked, and headlines that 103 readers wrote.",
            homepage="https://msnews.github.io/pens.html",
            citation="Ao et al. (2021). PENS: A Dataset and Generic Framework for Personalized News Headline "
            "Generation. ACL.",
            license="Microsoft Research License Terms",
        )

    def sources(self, directory: Path) -> list[Path]:
        news, *parts = (directory / name for name in NAMES)
        if not news.is_file():
            raise UserError(f"{news}: not found; it has the articles of PENS (https://msnews.github.io/pens.html)")
        if there := [path for path in parts if path.is_file()]:
            return [news, *there]
        names = ", ".join(path.name for path in parts)
        raise UserError(f"{directory}: holds none of {names}; part of PENS (https://msnews.github.io/pens.html)")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        directory = Path(dl_manager.manual_dir)
        options: Options = self.builder_config.options
        news, *parts = (directory / name for name in NAMES)
        self.left_out = collections.Counter()
        maker = _Maker(read_news(news, options.body_words, self.bad), options, self.left_out)
        # In this order: a user's first impression is looked for in train.tsv first.
        made = {"train": self._clicked, "validation": self._clicked, "test": self._written}
        return {
            split: self._generate_examples(records(path, maker))
            for (split, records), path in zip(made.items(), parts, strict=True)
            if path.is_file()
        }

    def _clicked(self, path: Path, maker: "_Maker") -> Iterator[Record]:
        for row in read_impressions(path, self.bad):
            yield from maker.clicked(row.user_id, row.history, row.clicked)

    def _written(self, path: Path, maker: "_Maker") -> Iterator[Record]:
        for row in read_rewrites(path, self.bad):
            yield from maker.written(row.user_id, row.history, row.rewrites)


class _Maker:
    """Rows of the files -> records; counts what it leaves out."""

    def __init__(self, news: dict[str, Article], options: Options, left_out: dict[str, int]) -> None:
        self.news, self.options, self.left_out = news, options, left_out
        self.contexts: dict[str, list[str]] = {}  # of the users of train.tsv and valid.tsv, news ids

    def clicked(self, user: str, history: Sequence[str], clicked: Sequence[str]) -> Iterator[Record]:
        if user not in self.contexts:
            self.contexts[user] = self._known(history)
        context = self.contexts[user]
        if not context:
            self.left_out["impressions of users without a known history"] += 1
            return
        known = set(context)
        asked = [news_id for news_id in clicked if self._has_both(news_id)]
        fresh = [news_id for news_id in asked if news_id not in known]
        self.left_out["clicked headlines that the user's history has"] += len(asked) - len(fresh)
        for news_id in fresh[: self.options.targets]:
            yield self._record(user, context, news_id, self.news[news_id].headline, ())

    def written(self, user: str, history: Sequence[str], rewrites: Sequence[tuple[str, str]]) -> Iterator[Record]:
        context = self._known(history)
        for news_id, title in rewrites:
            if not title:
                self.left_out["empty rewritten headlines"] += 1
            elif self._has_both(news_id):
                yield self._record(user, context, news_id, title, (title,))

    def _known(self, history: Sequence[str]) -> list[str]:
        """The last ones whose headlines there are."""
        known = [news_id for news_id in history if news_id in self.news and self.news[news_id].headline]
        self.left_out["history entries without a headline in news.tsv"] += len(history) - len(known)
        return known[-self.options.context :]

    def _has_both(self, news_id: str) -> bool:
        there = news_id in self.news and all(self.news[news_id])
        self.left_out["articles to ask for without a headline and a body in news.tsv"] += not there
        return there

    def _record(
        self, user: str, context: Sequence[str], news_id: str, headline: str, references: tuple[str, ...]
    ) -> Record:
        prompt = f"{self.options.question}\n\n{self.news[news_id].body}"
        return Record(
            user,
            tuple(self.news[clicked].headline for clicked in context),
            ({"role": "user", "content": prompt}, {"role": "assistant", "content": headline}),
            references=references,
            source=f"user {user!r}, news id {news_id!r}",
        )
