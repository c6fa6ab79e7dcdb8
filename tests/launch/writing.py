"""What test_kills kills."""

from pathlib import Path

from e2p_jax.files import replace_directory, write_text


def write(out: str, text: str) -> None:
    """Replaces a directory."""
    with replace_directory(Path(out)) as temporary:
        (temporary / "deep").mkdir()
        for name in ("a", "deep/b"):
            (temporary / name).write_text(text)


def fail(out: str) -> None:
    """Does not come to that."""
    with replace_directory(Path(out)):
        raise ValueError(out)


def write_file(path: str, text: str, times: int = 1) -> None:
    """Replaces a file."""
    for _ in range(times):
        write_text(path, text)


def prefixes_in_small_shards(arguments: list[str]) -> int:
    """`e2p prefixes`, with four users a shard."""
    from e2p_jax.cli import main
    from e2p_jax.export import prefix_table

    prefix_table.rows_a_shard = lambda projector, dtype: 4
    return main(["prefixes", *arguments])
