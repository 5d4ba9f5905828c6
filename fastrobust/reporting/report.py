"""One self-contained page about one or more runs."""

import statistics
import sys
from pathlib import Path

from fastrobust.attack.threat import NORMS
from fastrobust.config.numbers import ball_in_words, describe
from fastrobust.config.reading import flatten
from fastrobust.evaluation.results import wilson
from fastrobust.evaluation.trained import open_trained
from fastrobust.models import Normalized
from fastrobust.models.weights import read_weights, weights_digest
from fastrobust.reporting import inspection, known
from fastrobust.reporting.charts import Line, chart, escape, page, picture, table
from fastrobust.reporting.inspection import STEPS
from fastrobust.reporting.known import EXACT, EXACT_NOTE, NONE, OTHER_IMAGES
from fastrobust.reporting.stored import Run, read_run
from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import check_writable, write_text
from fastrobust.runtime.progress import Progress, duration

CURVES = [  # (key of metrics.jsonl, title, is an accuracy)
    ("loss", "Training loss", False),
    ("train_accuracy", "Accuracy under the training attack", True),
    ("guard_clean_accuracy", "Clean accuracy, guard's images", True),
    ("guard_accuracy", "PGD accuracy, guard's images", True),
    ("alignment", "Alignment of the attack's gradients", False),
    ("learning_rate", "Learning rate at the epoch's end", False),
    ("images_per_second", "Training images per second", False),
]
MANY_CLASSES = 20  # beyond these only the weakest are listed
LISTED = 10


def command(arguments) -> int:
    """The report command."""
    check_writable(Path(arguments.output))
    device = distributed.pick_device(arguments.device)
    directories = [run for given in arguments.runs for run in runs_in(Path(given))]
    runs = [read_run(directory) for directory in directories]
    for one, name, directory in zip(runs, distinct_names(directories), directories, strict=True):
        model = opened(name, directory)
        one.name, one.known = name, known.read(directory, None if model is None else weights_digest(model), model)
        if arguments.limit:
            look_at(one, directory, arguments.limit, device, arguments.data)
            if one.unseen:
                print(f"warning: {name}: no attacks were run for the page: {one.unseen}", file=sys.stderr)
    write_text(Path(arguments.output), render(runs))
    print(f"wrote {arguments.output}")
    return 0


def runs_in(path: Path) -> list[Path]:
    """A run directory itself, or all those below a folder."""
    below = [] if (path / run_directory.CONFIG).exists() else sorted(f.parent for f in path.rglob(run_directory.CONFIG))
    return below or [path]


def distinct_names(directories: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [d.resolve().parts for d in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {p[-1]}" for i, p in enumerate(parts)]


def opened(name: str, path: Path) -> Normalized | None:
    """The model of a run directory; None where there are no weights, or (which is said) damaged ones."""
    if not (path / run_directory.WEIGHTS).exists():
        return None
    try:
        return read_weights(path)[0]
    except FastrobustError as error:
        print(f"warning: {name}: only the summary's accuracies are shown: {error}", file=sys.stderr)
        return None


def look_at(one: Run, directory: Path, count: int, device, data: str | None) -> None:
    """Fill in `seen`, or `unseen` with the reason."""
    try:
        trained = open_trained(directory, data, device)
        config, one.classes, images = trained.config, trained.classes, trained.images(count)
    except FastrobustError as error:
        one.unseen = str(error)
        return
    epsilon = config.evaluation.epsilon[0] or config.epsilon
    if epsilon == 0:
        one.unseen = "the radius of its evaluation is 0"
        return
    radii = inspection.sweep(epsilon, config.norm, images.images.shape[1:])
    with Progress(f"attack {one.name}", len(radii) * len(images.labels)) as bar:
        told = lambda n: bar.advance(n, "several radii" if bar.due() else None)
        common = {"epsilon": epsilon, "norm": config.norm, "seed": config.seed, "progress": told}
        one.seen = inspection.inspect(trained.model, images, **common)


def render(runs: list[Run]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [f"<h1>{escape(title)}</h1>", *map(warnings, runs), summary_table(runs), curves(runs), robustness(runs)]
    return page(title, "\n".join([*sections, pictures(runs), configs(runs)]))


def warnings(one: Run) -> str:
    warned = [record for record in one.history if record.warning]
    told = [f"epoch {r.epoch}: {r.warning}" for r in warned if r.went_back_to is not None or r is warned[-1]]
    if one.summary is None:
        told = ["is not finished: what it has so far is shown."]
    elif one.summary.stopped:
        told = [one.summary.stopped]
    told += [one.known.left_out] if one.known and one.known.left_out else []
    return "".join(f'<p class="warn"><b>{escape(one.name)}</b> {escape(text)}</p>' for text in told)


def summary_table(runs: list[Run]) -> str:
    rows: dict[str, list[str]] = {}

    def put(name: str, column: int, text: str, more: str = "") -> None:
        cells = rows.setdefault(name, ["" for _ in runs])
        cells[column] += "<br>" * bool(cells[column]) + escape(text) + (f" <small>({escape(more)})</small>" if more else "")

    for i, one in enumerate(runs):
        config, hardware = one.config, one.environment.hardware
        put("method", i, config.in_words())
        put("data and model", i, f"{config.data.dataset}, {config.model.name}")
        for row in one.known.accuracies:
            low, high = row.interval
            images = f"n = {row.examples:,}{one.known.which(row)}{row.unusual}"
            name = "clean accuracy" if row.attack == NONE else f"{row.attack}, {ball_in_words(row.epsilon, row.norm)}"
            put(name, i, row.in_words(), f"{low * 100:.1f} to {high * 100:.1f}, {images}")
        for m in one.known.masking:
            images = f"{m.examples:,} images{one.known.which(m)}"
            put(f"masked gradients, {ball_in_words(m.epsilon, m.norm)}", i, m.in_words(), images)
        times = [r.seconds for r in one.history]
        if times:
            span = f"; {duration(min(times))} to {duration(max(times))}" if len(times) > 1 else ""
            taken, of = (
                (one.summary.train_seconds, "") if one.summary else (sum(times), f" of {config.epochs} epochs so far")
            )
            done = f"{one.history[-1].epoch}{of or ' epochs'} in {duration(taken)}"
            put("training", i, done, f"a pass over the data: {duration(statistics.median(times))}{span}")
        for e in one.summary.evaluations if one.summary else []:
            put("evaluation", i, duration(e.seconds), f"{e.attack}, {ball_in_words(e.epsilon, e.norm)}")
        speeds = [record.images_per_second for record in one.history if record.images_per_second]
        if speeds:
            put("images per second", i, f"{statistics.median(speeds):,.0f}", "median of the epochs")
        threads = hardware.get("threads", "?")
        put("hardware", i, f"{hardware.get('device', 'not recorded')}, {threads} thread{'' if threads == 1 else 's'}")
        put("seed", i, str(config.seed))
    note = (
        "PGD-STEPS-STARTS: so many steps from each of so many random starts. Robust: classified correctly at every "
        "point of all of them. In brackets: 95 % Wilson interval in per cent, n test images."
    )
    if any(row.attack == EXACT for one in runs for row in one.known.accuracies):
        note += f" {EXACT_NOTE}"
    if any(found.other for one in runs for found in (*one.known.accuracies, *one.known.masking)):
        note += f" {OTHER_IMAGES}"
    body = table([[escape(name), *cells] for name, cells in rows.items()], heads(runs))
    return f'<h2>Summary</h2>{body}<p class="note">{note}</p>'


def heads(runs: list[Run]) -> list[str]:
    return ["", *(escape(one.name) for one in runs)] if len(runs) > 1 else []


def curves(runs: list[Run]) -> str:
    found = []
    for key, title, accuracy in CURVES:
        series = [[(r.epoch, getattr(r, key)) for r in one.history if getattr(r, key) is not None] for one in runs]
        lines = [Line(one.name, points, i) for i, (one, points) in enumerate(zip(runs, series, strict=True)) if points]
        if lines:
            found.append(chart(title, lines, x="epoch", percent=accuracy))
    guards = sorted({(one.config.guard.steps, r.guard_images) for one in runs for r in one.history if r.guard_images})
    asked = " or ".join(f"PGD-{steps} on the same {images} training images" for steps, images in guards)
    note = f"The guard attacks after each epoch: {asked}. They show a collapse, if there is one." if asked else ""
    return f'<h2>Training</h2><p class="note">{note}</p><div class="grid">{"".join(found)}</div>' if found else ""


def against_epsilon(runs: list[Run], norm: str) -> str:
    """The chart of all runs that were attacked in this norm: radii of different norms share no axis."""
    seen = [(i, one) for i, one in enumerate(runs) if one.seen and one.seen.norm == norm]
    small = all("/" in describe(one.config.epsilon) and one.config.epsilon < 0.15 for _, one in seen)
    unit = 255 if small else 1  # of the axis: radii that were given in 255ths are shown so
    lines = []
    for i, one in seen:
        n, radii = one.seen.count, [(e * unit, k) for e, k in one.seen.radii]
        lines.append(Line(one.name, [(e, k / n) for e, k in radii], i, [(e, *wilson(k, n)) for e, k in radii]))
    axis = "epsilon, in 255ths" if small else "epsilon, pixels in [0, 1]"
    title = "Images still classified correctly"
    if norm != "linf":
        title, axis = f"{title}, {norm.upper()}", f"{norm.upper()}, {axis}"
    trained = {one.config.epsilon * unit for _, one in seen if one.config.method.attacks}
    marks = [(radius, "trained at") for radius in trained]
    return chart(title, lines, x=axis, percent=True, marks=marks) if lines else ""


def robustness(runs: list[Run]) -> str:
    """Accuracy against epsilon, and by class."""
    told = [f"{one.name} was not attacked here: {one.unseen.splitlines()[0]}" for one in runs if one.unseen]
    missing = "".join(f'<p class="note">{escape(text)}</p>' for text in told)
    seen = [one for one in runs if one.seen]
    if not seen:
        return missing
    counts = " or ".join(str(n) for n in sorted({one.seen.count for one in seen}))
    text = (
        f"PGD-{STEPS}, one restart, on {counts} test images, each class in proportion; the band is the 95 % Wilson "
        "interval. So weak an attack gives an upper bound, and so few images a rough one: the figures to quote are the "
        "summary's."
    )
    drawn = "".join(against_epsilon(runs, norm) for norm in NORMS)
    cards = drawn + "".join(class_card(one) for one in seen)
    return (
        f'<h2>Accuracy against epsilon and by class</h2><p class="note">{text}</p>{missing}<div class="grid">{cards}</div>'
    )


def class_card(one: Run) -> str:
    rows = []
    for label, name in enumerate(one.classes):
        mine = one.seen.labels == label
        if n := int(mine.sum()):
            rows.append((name, n, int(one.seen.clean[mine].sum()) / n, int(one.seen.robust[mine].sum()) / n))
    note = f"robust: under PGD-{STEPS} at {ball_in_words(one.seen.epsilon, one.seen.norm)}"
    if len(rows) > MANY_CLASSES:
        note += f"; the {LISTED} of {len(rows)} classes with the fewest robust images"
        rows = sorted(rows, key=lambda row: row[3])[:LISTED]
    cells = [
        [escape(name), str(n), *(f'<meter value="{share:.3f}"></meter> {share:.0%}' for share in shares)]
        for name, n, *shares in rows
    ]
    images = f"images: {one.seen.source}; SHA-256 {one.seen.checksum[:12]}…"
    notes = f'<div class="note">{note}</div><div class="note">{escape(images)}</div>'
    return f"<div><h3>{escape(one.name)}</h3>{table(cells, ['class', 'n', 'clean', 'robust'])}{notes}</div>"


def pictures(runs: list[Run]) -> str:
    chosen = [(one, one.seen.pictures[i : i + 3]) for one in runs if one.seen for i in range(0, len(one.seen.pictures), 3)]
    cards = "".join(picture_card(one, few) for one, few in chosen)
    text = (
        "The first test image of each of several classes, not chosen by outcome. The gradient is that of the loss with "
        "respect to the clean image: grey is zero, each picture on its own scale. A robust model's gradients follow shapes; "
        "an undefended one's look like noise."
    )
    return f'<h2>What the model sees</h2><p class="note">{text}</p><div class="grid">{cards}</div>' if cards else ""


def picture_card(one: Run, chosen: list[inspection.Picture]) -> str:
    epsilon = largest = one.seen.epsilon  # that a pixel changes by
    if one.seen.norm != "linf":
        largest = max(p.delta.abs().max().item() for p in chosen) or 1.0
    heading = ["<b>image</b>", f"<b>change</b> ×{0.5 / largest:.3g}", "<b>sum</b>", "<b>gradient</b>"]
    cells = [f"<div>{cell}</div>" for cell in heading]
    for p in chosen:
        x, truth = p.image.float() / 255, one.classes[p.label]
        scale = p.gradient.abs().flatten().quantile(0.99).clamp(min=1e-30)
        for what, pixels, predicted, sure in (
            ("test image", x, p.predicted, p.sure),
            ("perturbation", 0.5 + p.delta / (2 * largest), None, 0),
            ("adversarial image", x + p.delta, p.adversarial, p.adversarial_sure),
            ("gradient", 0.5 + 0.5 * (p.gradient / scale).clamp(-1, 1), None, 0),
        ):
            shown = pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            text = "" if predicted is None else f"{one.classes[predicted]} {sure:.0%}"
            wrong = predicted not in (None, p.label)
            below = f'<div class="wrong">{escape(f"{text} (is {truth})")}</div>' if wrong else escape(text)
            cells.append(f"<div>{picture(shown, f'{what} of {truth}')}{below}</div>")
    note = f"{ball_in_words(epsilon, one.seen.norm)}; below the images: prediction, its probability; red where wrong"
    pictures = f'<div class="pictures">{"".join(cells)}</div><div class="note">{note}</div>'
    return f"<div><h3>{escape(one.name)}</h3>{pictures}</div>"


def configs(runs: list[Run]) -> str:
    """What differs between the runs, then every config whole, with versions."""
    flat = [flatten(one.config.to_dict()) for one in runs]
    keys = [key for key in dict.fromkeys(key for f in flat for key in f) if key not in ("name", "output")]
    show = lambda value: escape(f"{value:.4g}" if isinstance(value, float) else value)
    differing = [(key, [f.get(key, "") for f in flat]) for key in keys]
    rows = [[escape(key), *map(show, values)] for key, values in differing if len(set(map(str, values))) > 1]
    parts = ["<h2>Config and versions</h2>"]
    if len(runs) > 1:
        parts += ["<h3>What differs</h3>", table(rows, heads(runs)) if rows else "<p>Nothing but names.</p>"]
    for one in runs:
        versions = [f"{name} {v}" for name, v in one.environment.versions.items()]
        text = ", ".join([*versions, *([f"commit {one.environment.commit}"] if one.environment.commit else [])])
        whole = f"<p>{escape(text)}</p><pre>{escape(one.config.to_yaml())}</pre>"
        parts.append(f"<details><summary>{escape(one.name)}: the whole config</summary>{whole}</details>")
    return "\n".join(parts)
