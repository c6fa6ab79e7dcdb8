"""Finds out whether a chat template ends, by rendering it in a process of its own, with little time and memory.

A template comes with a model, from anybody. What it raises is found out when it is rendered in earnest; here only that
it neither runs for ever nor fills the memory.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SECONDS, MEBIBYTES = 3, 512  # of processor time; of memory, Python itself included
_OUTPUT = 1 << 24  # characters
_PATIENCE = 20  # real seconds for one of processor time, on a machine that is busy


def misbehaviour(template: str, special: Mapping[str, str], conversations: Sequence[Sequence[str]]) -> str | None:
    """Says what is wrong with it; None if it ends for conversations of these roles.

    Args:
      special: the tokenizer's special tokens, as the template gets them.
      conversations: roles of messages.
    """
    return _tried(json.dumps([template, dict(special), conversations, SECONDS, MEBIBYTES]))


@functools.lru_cache(maxsize=64)
def _tried(task: str) -> str | None:
    command = [sys.executable, "-P", str(Path(__file__))]
    try:
        done = subprocess.run(command, input=task, text=True, capture_output=True, timeout=SECONDS * _PATIENCE)
    except subprocess.TimeoutExpired:
        return f"does not end within {SECONDS * _PATIENCE} s"
    except OSError as error:
        return f"could not be tried ({error.strerror})"
    if done.returncode < 0:  # the processor-time limit, or the stack's end
        return f"does not end within {SECONDS} s, or crashes (signal {-done.returncode})"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["fails without a word"])[-1]
    return None


def _main() -> None:
    import resource

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The generation markers, without a meaning."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    template, special, conversations, seconds, mebibytes = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": str}
    length = 0
    try:
        compiled = environment.from_string(template)
        for roles in conversations:
            messages = [{"role": role, "content": f"message {number}"} for number, role in enumerate(roles)]
            for prompt in (False, True):
                try:
                    for part in compiled.generate(messages=messages, add_generation_prompt=prompt, **special):
                        length += len(part)
                        if length > _OUTPUT:
                            sys.exit(f"writes more than {_OUTPUT:,} characters")
                except MemoryError:
                    sys.exit(f"needs more than {mebibytes} MiB of memory")
                except Exception:
                    continue
    except MemoryError:
        sys.exit(f"needs more than {mebibytes} MiB of memory")
    except Exception:
        return  # no template at all: the tokenizer will say so


if __name__ == "__main__":
    _main()
