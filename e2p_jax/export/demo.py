"""A page that answers a prompt as several users side by side, served on this machine alone. Needs Gradio."""

import html
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from e2p_jax.config import Condition
from e2p_jax.data.conditions import FRONTS
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.evaluation import read_splits
from e2p_jax.evaluate.generate import stream, vectors_for
from e2p_jax.export.demo_access import NAMES, OwnPageOnly
from e2p_jax.options import Sampling
from e2p_jax.terminal import printable
from e2p_jax.train.run import Run

HOST = "127.0.0.1"
SHOWN = 1000  # users to choose from: what a browser's list can hold
MOST_USERS, LONGEST_PROMPT, LONGEST_REPLY = 8, 4000, 128  # of one request: users, characters, tokens
SECONDS = 60  # that a reply may grow for
AT_ONCE, WAITING = 4, 16  # requests: those answered, a token each in turn, and those that wait for one of them to end
_STYLE = """
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
.e2p-user { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 1rem; margin-bottom: 1rem; }
.e2p-user h3 { margin: 0 0 .25rem; font-size: 1.05rem; }
.e2p-context { color: var(--body-text-color); opacity: .75; font-size: .9rem; margin-bottom: .9rem; }
.e2p-ways { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; }
.e2p-way { background: var(--background-fill-secondary); border-radius: 8px; padding: .6rem .8rem; }
.e2p-way.own { border-left: 4px solid var(--color-accent); }
.e2p-way h4 { margin: 0 0 .3rem; font-size: .8rem; font-weight: 600; color: var(--body-text-color); opacity: .7; }
.e2p-way p { margin: 0; min-height: 1.5rem; overflow-wrap: anywhere; }
"""


def serve(run: Run, port: int) -> None:
    """Serves the page until the process is interrupted.

    Raises:
      UserError: the run's data has fewer than two users with a vector, or the port is taken.
    """
    people = find_people(run)
    page = build(run, people)
    launch(page, port)
    print(f"http://{HOST}:{port}", flush=True)
    page.block_thread()


def launch(page: gradio.Blocks, port: int) -> None:
    """Serves the page in the background.

    Raises:
      UserError: the port is taken.
    """
    page.queue(max_size=WAITING)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace"])  # none from elsewhere
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=NAMES, www_redirect=False), Middleware(OwnPageOnly)]
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            quiet=True,
            theme=theme,
            css=_STYLE,
            footer_links=[],
            app_kwargs={"middleware": guards},
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port {port}: {error}; choose another") from error


def find_people(run: Run) -> dict[str, tuple[str, ...]]:
    """User id -> context, of the first held-out split's users who have a vector, in its order.

    Raises:
      UserError: fewer than two, a bad record, or the run was trained on no users' vectors.
    """
    run.own_condition()
    data, table = run.inputs.config.data, run.inputs.table
    if table is None:
        raise UserError("the run names no table of user vectors; give --embeddings TABLE")
    people: dict[str, tuple[str, ...]] = {}
    for record in read_splits(data, data.eval_splits[:1])[data.eval_splits[0]]:
        people.setdefault(record.user_id, record.context)
    known = [user for user, row in zip(people, table.index.find(list(people)), strict=True) if row >= 0]
    if len(known) < 2:
        raise UserError(f"{data.path}: {len(known)} user(s) of split {data.eval_splits[0]!r} have a vector; needs two")
    return {user: people[user] for user in known[:SHOWN]}


def answers(
    run: Run, people: Mapping[str, tuple[str, ...]], users: Sequence[str], prompt: str, sampling: Sampling
) -> Iterator[list[tuple[str, str, str]]]:
    """The replies as they grow, of each user: with what stood in front in training, with nothing, and with the next
    user's.

    Args:
      people: as `find_people` gives them.
    """
    own = run.own_condition()
    columns: tuple[Condition, ...] = (own, "none", own)
    names = [name for i, user in enumerate(users) for name in (user, user, users[(i + 1) % len(users)])]
    asked = ({"role": "user", "content": prompt},)
    records = [Record(name, people[name], asked, source="the prompt") for name in names]
    vectors = vectors_for(run, names, names, own)
    for replies in stream(run, records, vectors, columns * len(users), sampling):
        yield [(replies[i], replies[i + 1], replies[i + 2]) for i in range(0, len(replies), len(columns))]


def build(run: Run, people: dict[str, tuple[str, ...]]) -> gradio.Blocks:
    """The page."""
    answering: set[str | None] = set()  # sessions
    lock = threading.Lock()

    def ask(
        users: Any, prompt: Any, temperature: Any, length: Any, seed: Any, request: gradio.Request
    ) -> Iterator[str]:
        chosen, text, sampling = check(people, users, prompt, temperature, length, seed)
        with lock:
            if request.session_hash in answering:
                raise refused("Your last prompt is still being answered.")
            answering.add(request.session_hash)
        try:
            first = None
            for said in answers(run, people, chosen, text, sampling):
                yield render(chosen, people, said)
                first = first or time.monotonic()  # what comes before it compiles, once for every size
                if time.monotonic() - first > SECONDS:
                    gradio.Warning(f"Stopped after {SECONDS} s.")
                    return
        except UserError as error:
            raise refused(str(error)) from error
        finally:
            with lock:
                answering.discard(request.session_hash)

    def show(users: Any) -> str:
        chosen = check_users(people, users, least=0)
        return render(chosen, people, [("", "", "")] * len(chosen))

    first = list(people)[:2]
    with gradio.Blocks(title="Embedding-to-Prefix", analytics_enabled=False) as page:
        gradio.Markdown(f"# One prompt, several users\n{_describe(run)}")
        users = gradio.Dropdown(
            list(people), value=first, multiselect=True, max_choices=MOST_USERS, label="Users", elem_id="users"
        )
        prompt = gradio.Textbox(
            label="Prompt", placeholder="do you have any pets?", max_length=LONGEST_PROMPT, elem_id="prompt"
        )
        with gradio.Accordion("Sampling", open=False):
            temperature = gradio.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the most likely token)")
            length = gradio.Slider(1, LONGEST_REPLY, value=32, step=1, label="Longest reply, in tokens")
            seed = gradio.Number(0, precision=0, label="Seed")
        button = gradio.Button("Ask", variant="primary", elem_id="ask")
        shown = gradio.HTML(show(first), elem_id="answers", padding=False)
        # preprocess=False: what a request holds is checked here, all of it, and answered with a reason.
        users.change(show, users, shown, show_progress="hidden", preprocess=False, concurrency_limit=None)
        for event in (button.click, prompt.submit):
            event(
                ask,
                [users, prompt, temperature, length, seed],
                shown,
                show_progress="hidden",
                preprocess=False,
                concurrency_id="ask",
                concurrency_limit=AT_ONCE,
            )
    return page


def refused(reason: str) -> gradio.Error:
    """To be raised: shown on the page, and not as a traceback in the terminal."""
    return gradio.Error(printable(reason), print_exception=False)


def check_users(people: dict[str, tuple[str, ...]], users: Any, least: int = 2) -> list[str]:
    """The users of a request.

    Raises:
      gradio.Error: too few or too many, one twice, or one whom the page does not offer.
    """
    if not isinstance(users, list) or not all(isinstance(user, str) and user in people for user in users):
        raise refused("Choose users of the list.")
    if not least <= len(users) <= MOST_USERS or len(set(users)) < len(users):
        raise refused(f"Choose {least} to {MOST_USERS} users, each once.")
    return users


def check(
    people: dict[str, tuple[str, ...]], users: Any, prompt: Any, temperature: Any, length: Any, seed: Any
) -> tuple[list[str], str, Sampling]:
    """Holds a request to its form and bounds; any program can send one.

    Raises:
      gradio.Error: saying what is not.
    """
    chosen = check_users(people, users)
    if not isinstance(prompt, str) or not (text := prompt.strip()):
        raise refused("Type a prompt.")
    if len(text) > LONGEST_PROMPT:
        raise refused(f"The prompt has {len(text):,} characters; {LONGEST_PROMPT:,} are the most.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise refused("The prompt holds half a surrogate pair.")
    numbers = (
        ("Temperature", temperature, 0, 2),
        ("The longest reply", length, 1, LONGEST_REPLY),
        ("The seed", seed, 0, 2**32 - 1),
    )
    for name, value, least, most in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise refused(f"{name} must be a number from {least} to {most}.")
    return chosen, text, Sampling(max_new_tokens=int(length), temperature=float(temperature), seed=int(seed))


def render(users: Sequence[str], people: dict[str, tuple[str, ...]], said: Sequence[tuple[str, str, str]]) -> str:
    """A card for each user: context, and the three replies."""
    cards = []
    for i, (user, replies) in enumerate(zip(users, said, strict=True)):
        titles = ("with their own soft token", "without", f"with the soft token of {users[(i + 1) % len(users)]}")
        ways = "".join(
            f'<div class="e2p-way {kind}"><h4>{html.escape(title)}</h4><p>{html.escape(reply)}</p></div>'
            for kind, title, reply in zip(("own", "none", "swapped"), titles, replies, strict=True)
        )
        context = html.escape(" ".join(people[user])) or "no context in the data"
        cards.append(
            f'<div class="e2p-user"><h3>{html.escape(user)}</h3><div class="e2p-context">{context}</div>'
            f'<div class="e2p-ways">{ways}</div></div>'
        )
    return "".join(cards)


def _describe(run: Run) -> str:
    config = run.inputs.config.portable()
    reads = "reads it, too, but in the middle" if FRONTS[config.data.condition].context else "never reads it here"
    return (
        f"{config.projector.num_tokens} soft token(s) `{config.prefix.placement}`, backbone `{config.backbone.path}`, "
        f"step {run.step}. The context is what a user's vector stands for; the model {reads}."
    )
