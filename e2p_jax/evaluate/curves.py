"""The picture of a run: its loss curve."""

import io

from etils import epath

from e2p_jax.files import write_bytes
from e2p_jax.train.metrics import read_metrics


def draw_loss(run: epath.Path) -> epath.Path:
    """Writes `report/loss.png`: training loss and held-out NLL by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in sorted({key for line in lines for key in line if key.endswith(("/loss", "/nll"))}):
        points = [(line["step"], line[name]) for line in lines if name in line]
        held_out = name.startswith("eval/")
        label = name.removesuffix("/nll").removeprefix("eval/") if held_out else "training"
        style = {"marker": "o", "markersize": 3} if held_out else {"alpha": 0.5, "linewidth": 1}
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="NLL per target (nats)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    path = run / "report" / "loss.png"
    write_bytes(path, picture.getvalue())
    return path
