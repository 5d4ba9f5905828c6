"""One self-contained page about one or more runs."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from fastrobust.attack.threat import NORMS
from fastrobust.config.numbers import ball_in_words, describe
from fastrobust.config.reading import flatten
from fastrobust.evaluation.results import wilson
from fastrobust.evaluation.trained import open_trained
from fastrobust.models.weights import read_weights, weights_digest
from fastrobust.reporting import inspection, known
from fastrobust.reporting.charts import COLOURS, Line, chart, escape, legend, number, page, picture, table
from fastrobust.reporting.inspection import STEPS
from fastrobust.reporting.known import EXACT, EXACT_NOTE, NONE, Accuracy
from fastrobust.reporting.stored import Run, read_run
from fastrobust.runtime import distributed, run_directory
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import write_text
from fastrobust.runtime.progress import Progress, duration

CURVES = [  # (key of metrics.jsonl, title, is an accuracy)
    ("loss", "Training loss", False),
    ("train_accuracy", "Accuracy under the training attack", True),
    ("guard_clean_accuracy", "Clean accuracy, guard's images", True),
    ("guard_accuracy", "PGD accuracy, guard's images", True),
    ("learning_rate", "Learning rate at the epoch's end", False),
    ("images_per_second", "Training images per second", False),
]
MANY_CLASSES = 20  # beyond these only the weakest are listed
LISTED = 10


def command(arguments) -> int:
    """The report command."""
    device = distributed.pick_device(arguments.device)
    runs = [read_run(directory) for directory in arguments.runs]
    for one, name in zip(runs, distinct_names(arguments.runs), strict=True):
        one.name = name
    for one, directory in zip(runs, arguments.runs, strict=True):
        one.known = known_of(one, Path(directory))
        if arguments.limit:
            look_at(one, directory, arguments.limit, device, arguments.data)
    write_text(Path(arguments.output), render(runs))
    print(f"wrote {arguments.output}")
    return 0


def distinct_names(directories: list[str]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(d).resolve().parts for d in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {p[-1]}" for i, p in enumerate(parts)]


def known_of(one: Run, path: Path) -> known.Known:
    """What the run directory tells about the weights in it. Raises RunError."""
    weights = None
    if (path / run_directory.WEIGHTS).exists():
        try:
            weights = weights_digest(read_weights(path)[0])
        except FastrobustError as error:
            text = f"only the summary's accuracies are shown: {error}"
            print(f"warning: {one.name}: {text}", file=sys.stderr)
    return known.read(path, weights)


def look_at(one: Run, directory: str, count: int, device, data: str | None) -> None:
    """Fill in `seen`, or `unseen` with the reason."""

    try:
        trained = open_trained(directory, data, device)
        config, one.classes, images = trained.config, trained.classes, trained.images(count)
    except FastrobustError as error:
        one.unseen = str(error).splitlines()[0]
        print(f"warning: {one.name}: no attacks were run for the page: {error}", file=sys.stderr)
        return
    epsilon = config.evaluation.epsilon[0] or config.epsilon
    if epsilon == 0:
        one.unseen = "the radius of its evaluation is 0"
        return
    with Progress(f"attack {one.name}", len(inspection.FACTORS) * len(images.labels)) as bar:
        one.seen = inspection.inspect(
            trained.model,
            images,
            epsilon=epsilon,
            seed=config.seed,
            norm=config.norm,
            progress=lambda n: bar.advance(n, "several radii" if bar.due() else None),
        )


def render(runs: list[Run]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [headline(runs, title), summary_table(runs), curves(runs), robustness(runs)]
    sections += [pictures(runs), where_time_went(runs), configs(runs)]
    return page(title, "\n".join(section for section in sections if section))


def share(row: Accuracy) -> str:
    """An accuracy with its 95 % interval and n, as HTML."""
    low, high = row.interval
    images = f"n = {row.examples:,}{f' of {row.data}' if row.data else ''}"
    return f"{row.in_words()} <small>({low * 100:.1f} to {high * 100:.1f}, {escape(images)})</small>"


def headline(runs: list[Run], title: str) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        parts.append(legend([(one.name, i) for i, one in enumerate(runs)], sticky=True))
    for one in runs:
        if one.summary is None:
            parts.append(f'<p class="warn"><b>{escape(one.name)}</b> is not finished: what it has so far is shown.</p>')
        elif one.summary.stopped:
            parts.append(f'<p class="warn"><b>{escape(one.name)}</b> {escape(one.summary.stopped)}</p>')
        else:
            warned = [record for record in one.history if record.warning]
            if warned:
                text = f"epoch {warned[-1].epoch}: {warned[-1].warning}"
                parts.append(f'<p class="warn"><b>{escape(one.name)}</b> {escape(text)}</p>')
    return "\n".join(parts)


def summary_table(runs: list[Run]) -> str:

    rows: dict[str, list[str]] = {}

    def put(name: str, column: int, cell: str) -> None:
        cells = rows.setdefault(name, ["" for _ in runs])
        cells[column] += f"<br>{cell}" if cells[column] else cell

    for i, one in enumerate(runs):
        config = one.config
        put("method", i, escape(config.in_words()))
        put("data and model", i, f"{escape(config.data.dataset)}, {escape(config.model.name)}")
        for row in one.known.accuracies:
            name = "clean accuracy" if row.attack == NONE else f"{row.attack}, {ball_in_words(row.epsilon, row.norm)}"
            put(name, i, share(row))
        for m in one.known.masking:
            told = f"{escape(m.in_words())} <small>({m.examples:,} images)</small>"
            put(f"masked gradients, {ball_in_words(m.epsilon, m.norm)}", i, told)
        if one.summary:
            put("training", i, f"{one.summary.epochs} epochs in {duration(one.summary.train_seconds)}")
        elif one.history:
            put("training", i, f"{one.history[-1].epoch} of {config.epochs} epochs so far")
        speeds = [record.images_per_second for record in one.history if record.images_per_second]
        if speeds:
            put("images per second", i, f"{statistics.median(speeds):,.0f} <small>(median of the epochs)</small>")
        hardware = one.environment.hardware
        threads = hardware.get("threads", "?")
        device = f"{hardware.get('device', 'not recorded')}, {threads} thread{'' if threads == 1 else 's'}"
        put("hardware", i, escape(device))
        put("seed", i, str(config.seed))
    head = ["", *(escape(one.name) for one in runs)] if len(runs) > 1 else ()
    note = (
        "PGD-STEPS-STARTS: so many steps from each of so many random starts. Robust: classified correctly at every "
        "point of all of them. In brackets: 95 % Wilson interval in per cent, n test images."
    )
    if any(row.attack == EXACT for one in runs for row in one.known.accuracies):
        note += f" {EXACT_NOTE}"
    body = table([[escape(name), *cells] for name, cells in rows.items()], head)
    return f'<h2>Summary</h2>{body}<p class="note">{note}</p>'


def curves(runs: list[Run]) -> str:
    found = []
    for key, title, accuracy in CURVES:
        lines = []
        for i, one in enumerate(runs):
            points = [(r.epoch, getattr(r, key)) for r in one.history if getattr(r, key) is not None]
            if points:
                lines.append(Line(one.name, points, i, dots=len(points) <= 40))
        if lines:
            y_range = (0.0, 1.0) if accuracy else None
            if key == "images_per_second":  # from 0: speed varies a little, and should look so
                y_range = (0.0, 1.05 * max(y for line in lines for _, y in line.points))
            found.append(chart(title, lines, x="epoch", percent=accuracy, y_range=y_range, keys=False))
    guards = sorted({(one.config.guard.steps, r.guard_images) for one in runs for r in one.history if r.guard_images})
    asked = " or ".join(f"PGD-{steps} on the same {images} training images" for steps, images in guards)
    note = f"The guard attacks after each epoch: {asked}. What its figures show is a collapse." if asked else ""
    told = f'<p class="note">{note}</p>' if note else ""
    return f'<h2>Training</h2>{told}<div class="grid">{"".join(found)}</div>' if found else ""


def against_epsilon(runs: list[Run], norm: str) -> str:
    """The chart of all runs that were attacked in this norm: radii of different norms share no axis."""
    lines, marks = [], {}
    small = all("/" in describe(one.config.epsilon) and one.config.epsilon < 0.15 for one in runs if one.config.norm == norm)
    unit = 255 if small else 1  # of the axis: radii that were given in 255ths are shown so
    for i, one in enumerate(runs):
        if one.seen and one.seen.norm == norm:
            n = one.seen.count
            band = [(e * unit, *wilson(k, n)) for e, k in one.seen.radii]
            lines.append(Line(one.name, [(e * unit, k / n) for e, k in one.seen.radii], i, band))
            if one.config.method.attacks:
                marks[one.config.epsilon * unit] = "trained at"
    if not lines:
        return ""
    axis = "epsilon, in 255ths" if small else "epsilon, pixels in [0, 1]"
    axis = axis if norm == "linf" else f"{norm.upper()}, {axis}"
    along = list(marks.items())
    return chart(
        "Images still classified correctly", lines, x=axis, percent=True, y_range=(0.0, 1.0), marks=along, keys=False
    )


def robustness(runs: list[Run]) -> str:
    """Accuracy against epsilon, and by class."""

    drawn = "".join(against_epsilon(runs, norm) for norm in NORMS)
    missing = "".join(
        f'<p class="note">{escape(o.name)} was not attacked here: {escape(o.unseen)}</p>' for o in runs if o.unseen
    )
    if not drawn:
        return missing
    counts = " or ".join(str(n) for n in sorted({one.seen.count for one in runs if one.seen}))
    text = (
        f"PGD-{STEPS}, one restart, on {counts} test images, evenly spaced over the test set; the band is the 95 % Wilson "
        "interval. So weak an attack gives an upper bound, and so few images a rough one: the figures to quote are the "
        "summary's."
    )
    cards = drawn + "".join(class_card(one, i, len(runs) > 1) for i, one in enumerate(runs) if one.seen)
    return (
        f'<h2>Accuracy against epsilon and by class</h2><p class="note">{text}</p>{missing}<div class="grid">{cards}</div>'
    )


def class_card(one: Run, colour: int, titled: bool) -> str:

    rows = []
    for label, name in enumerate(one.classes):
        mine = one.seen.labels == label
        n = int(mine.sum())
        if n:
            rows.append((name, n, int(one.seen.clean[mine].sum()), int(one.seen.robust[mine].sum())))
    note = f"light: clean; dark: PGD at {ball_in_words(one.seen.epsilon, one.seen.norm)}"
    if len(rows) > MANY_CLASSES:
        note += f"; the {LISTED} of {len(rows)} classes with the fewest robust images"
        rows = sorted(rows, key=lambda row: row[3] / row[1])[:LISTED]
    cells = []
    for name, n, clean, robust in rows:
        bar = (
            f'<div class="meter"><i class="b{colour % COLOURS}" style="width:{clean / n:.1%};opacity:0.4"></i>'
            f'<i class="b{colour % COLOURS}" style="width:{robust / n:.1%}"></i></div>'
        )
        cells.append([escape(name), bar, f"{clean / n:.0%}", f"{robust / n:.0%}", str(n)])
    title = f"<h3>{escape(one.name)}</h3>" if titled else ""
    images = f"images: {one.seen.source}; SHA-256 {one.seen.checksum[:12]}…"
    notes = f'<div class="note">{note}</div><div class="note">{escape(images)}</div>'
    return f'<div class="card">{title}{table(cells, ["class", "", "clean", "robust", "n"])}{notes}</div>'


def pictures(runs: list[Run]) -> str:
    cards = [picture_card(one, one.seen.pictures, True) for one in runs if one.seen]
    if len(runs) == 1 and cards:
        every = runs[0].seen.pictures
        cards = [picture_card(runs[0], every[i : i + 3], False) for i in range(0, len(every), 3)]
    if not cards:
        return ""
    text = (
        "The first test image of each of several classes, not chosen by outcome. The gradient is that of the loss with "
        "respect to the clean image: grey is zero, each picture on its own scale. A robust model's gradients follow shapes; "
        "an undefended one's look like noise."
    )
    return f'<h2>What the model sees</h2><p class="note">{text}</p><div class="grid">{"".join(cards)}</div>'


def picture_card(one: Run, chosen: list, titled: bool) -> str:

    epsilon = largest = one.seen.epsilon  # that a pixel changes by
    if one.seen.norm != "linf":
        largest = max(p.delta.abs().max().item() for p in chosen) or 1.0
    cells = ["<b>image</b>", f"<b>change</b> ×{0.5 / largest:.3g}", "<b>sum</b>", "<b>gradient</b>"]
    cells = [f"<div>{cell}</div>" for cell in cells]
    for p in chosen:
        x, truth = p.image.float() / 255, one.classes[p.label]
        scale = p.gradient.abs().flatten().quantile(0.99).clamp(min=1e-30)

        def cell(pixels, what: str, text: str = "", wrong: bool = False, truth: str = truth) -> str:
            shown = pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            css = ' class="wrong"' if wrong else ""
            return f"<div>{picture(shown, f'{what} of {truth}')}<div{css}>{escape(text)}</div></div>"

        def told(predicted: int, sure: float, label: int = p.label, truth: str = truth) -> str:
            return f"{one.classes[predicted]} {sure:.0%}" + ("" if predicted == label else f" (is {truth})")

        before, after = told(p.predicted, p.sure), told(p.adversarial, p.adversarial_sure)
        cells.append(cell(x, "test image", before, p.predicted != p.label))
        cells.append(cell(0.5 + p.delta / (2 * largest), "perturbation"))
        cells.append(cell(x + p.delta, "adversarial image", after, p.adversarial != p.label))
        cells.append(cell(0.5 + 0.5 * (p.gradient / scale).clamp(-1, 1), "gradient"))
    title = f"<h3>{escape(one.name)}</h3>" if titled else ""
    below = "below the images: prediction, its probability; red where wrong, with the true class"
    note = f"{ball_in_words(epsilon, one.seen.norm)}; {below}"
    return f'<div class="card">{title}<div class="pictures">{"".join(cells)}</div><div class="note">{note}</div></div>'


def where_time_went(runs: list[Run]) -> str:

    cards = []
    for i, one in enumerate(runs):
        parts = [("training", sum(r.seconds for r in one.history))]
        for e in one.summary.evaluations if one.summary else []:
            parts.append((f"{e.attack}, {ball_in_words(e.epsilon, e.norm)}", e.seconds))
        total = sum(seconds for _, seconds in parts)
        if not total:
            continue
        shades = [f'class="b{i % COLOURS}" style="opacity:{max(0.2, 0.55**k):.2f}' for k in range(len(parts))]
        bar = "".join(f'<i {shade};width:{s / total:.2%}"></i>' for shade, (_, s) in zip(shades, parts, strict=True))
        keys = "".join(
            f'<span><i {shade}"></i>{escape(name)}: {duration(s)} ({s / total:.0%})</span>'
            for shade, (name, s) in zip(shades, parts, strict=True)
        )
        epochs = [r.seconds for r in one.history]
        note = f"a pass over the data took {duration(statistics.median(epochs))}" if epochs else ""
        if len(epochs) > 1:
            note += f" (median; {duration(min(epochs))} to {duration(max(epochs))})"
        title = f"<h3>{escape(one.name)}</h3>" if len(runs) > 1 else ""
        key = f'<div class="legend">{keys}</div>'
        cards.append(f'<div class="card">{title}<div class="bar">{bar}</div>{key}<div class="note">{note}</div></div>')
    return f'<h2>Where the time went</h2><div class="grid">{"".join(cards)}</div>' if cards else ""


def configs(runs: list[Run]) -> str:
    """What differs between the runs, then every config whole, with versions."""

    flat = [flatten(one.config.to_dict()) for one in runs]
    keys = list(dict.fromkeys(key for f in flat for key in f))
    differing = [key for key in keys if len({str(f.get(key, "")) for f in flat}) > 1 and key not in ("name", "output")]
    parts = ["<h2>Config and versions</h2>"]
    if len(runs) > 1:
        rows = [[escape(key), *(escape(show(f.get(key, ""))) for f in flat)] for key in differing]
        parts.append("<h3>What differs</h3>")
        head = ["", *(escape(one.name) for one in runs)]
        parts.append(table(rows, head) if rows else "<p>Nothing but names.</p>")
    for one in runs:
        versions = ", ".join(f"{name} {v}" for name, v in one.environment.versions.items())
        commit = one.environment.commit
        text = versions + (f", commit {commit}" if commit else "")
        whole = f"<p>{escape(text)}</p><pre>{escape(one.config.to_yaml())}</pre>"
        parts.append(
            f"<details><summary>{escape(one.name)}: the whole config, {escape(len(keys))} keys</summary>{whole}</details>"
        )
    return "\n".join(parts)


def show(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
