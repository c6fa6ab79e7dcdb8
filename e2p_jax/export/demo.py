"""A page that answers a prompt as several users side by side, served on this machine alone. Needs Gradio."""

import html
import os
from collections.abc import Iterator, Sequence

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio

from e2p_jax.config import Condition
from e2p_jax.data.prepared import load_records
from e2p_jax.data.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import stream, vectors_for
from e2p_jax.options import Sampling
from e2p_jax.train.run import Run

HOST = "127.0.0.1"
SHOWN = 1000  # users to choose from: what a browser's list can hold
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
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace"])  # none from elsewhere
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            theme=theme,
            css=_STYLE,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port {port}: {error}; choose another") from error
    print(f"http://{HOST}:{port}", flush=True)
    page.block_thread()


def find_people(run: Run) -> dict[str, tuple[str, ...]]:
    """User id -> context, of the first held-out split's users who have a vector, in its order.

    Raises:
      UserError: fewer than two.
    """
    data, table = run.inputs.config.data, run.inputs.table
    if table is None:
        raise UserError("the run names no table of user vectors; give --embeddings TABLE")
    people: dict[str, tuple[str, ...]] = {}
    for record in load_records(data.path, data.eval_splits[0]):
        people.setdefault(record.user_id, record.context)
    known = [user for user, row in zip(people, table.index.find(list(people)), strict=True) if row >= 0]
    if len(known) < 2:
        raise UserError(f"{data.path}: {len(known)} user(s) of split {data.eval_splits[0]!r} have a vector; needs two")
    return {user: people[user] for user in known[:SHOWN]}


def answers(run: Run, users: Sequence[str], prompt: str, sampling: Sampling) -> Iterator[list[tuple[str, str, str]]]:
    """The replies as they grow, of each user: with their own soft token, without one, and with the next user's."""
    columns: tuple[Condition, ...] = ("e2p", "none", "e2p")
    names = [name for i, user in enumerate(users) for name in (user, user, users[(i + 1) % len(users)])]
    records = [Record(name, (), ({"role": "user", "content": prompt},), source="the prompt") for name in names]
    vectors = vectors_for(run, names, names, "e2p")
    for replies in stream(run, records, vectors, columns * len(users), sampling):
        yield [(replies[i], replies[i + 1], replies[i + 2]) for i in range(0, len(replies), len(columns))]


def build(run: Run, people: dict[str, tuple[str, ...]]) -> gradio.Blocks:
    """The page."""

    def ask(users: list[str], prompt: str, temperature: float, max_new_tokens: float, seed: float) -> Iterator[str]:
        if len(users) < 2 or not prompt.strip():
            raise gradio.Error("Choose at least two users and type a prompt.", print_exception=False)
        sampling = Sampling(max_new_tokens=int(max_new_tokens), temperature=temperature, seed=int(seed))
        try:
            for said in answers(run, users, prompt.strip(), sampling):
                yield render(users, people, said)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def show(users: list[str]) -> str:
        return render(users, people, [("", "", "")] * len(users))

    first = list(people)[:2]
    with gradio.Blocks(title="Embedding-to-Prefix", analytics_enabled=False) as page:
        gradio.Markdown(f"# One prompt, several users\n{_describe(run)}")
        users = gradio.Dropdown(list(people), value=first, multiselect=True, label="Users", elem_id="users")
        prompt = gradio.Textbox(label="Prompt", placeholder="do you have any pets?", elem_id="prompt")
        with gradio.Accordion("Sampling", open=False):
            temperature = gradio.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the most likely token)")
            length = gradio.Slider(1, 128, value=32, step=1, label="Longest reply, in tokens")
            seed = gradio.Number(0, precision=0, label="Seed")
        button = gradio.Button("Ask", variant="primary", elem_id="ask")
        shown = gradio.HTML(show(first), elem_id="answers", padding=False)
        users.change(show, users, shown, show_progress="hidden")
        for event in (button.click, prompt.submit):
            event(ask, [users, prompt, temperature, length, seed], shown, show_progress="hidden")
    return page


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
    return (
        f"{config.projector.num_tokens} soft token(s) `{config.prefix.placement}`, backbone `{config.backbone.path}`, "
        f"step {run.step}. The context is what a user's vector stands for; the model never reads it here."
    )
