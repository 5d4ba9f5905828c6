"""What is reproduced: the paper's figures, and the run that stands for each. Accuracies are in per cent, as there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastrobust.train.schedules import Cyclic, Points
from fastrobust.tuning import sweep

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """`name` is the run's, shared by the tables that it stands in; without a `config` only the paper's figure is shown.
    Runs are trained in the order of `order`."""

    name: str
    label: str
    config: str | None
    overrides: tuple[str, ...] = ()
    paper: dict = field(default_factory=dict, hash=False, compare=False)
    order: int = 100


RUNS = Path("runs/reproduce")
GOAL = {"full": 0.45, "small": 0.5}  # of Table 3 and Figure 2
SECONDS = {"fashion_mnist_fast": 0.65, "cifar10_fgsm_fast": GOAL["full"]}  # the robust accuracy that each has to reach
RULE = (
    "The rule: the seconds are those of the whole training, from the first minibatch to the last update. Nothing "
    "stops a run when the goal is reached; the config is fixed before the seeds are trained, and all seeds are told. "
    "The guard's attacks, checkpoints, reading the data and the evaluation are not in them. Compilation and other "
    "warm-up are, and are told: what the first pass over the data took beyond the median of the others."
)
RADII = {"full": [0.1, 0.3], "small": [0.1, 0.25]}  # of Table 2
FIRST_TO_45 = {"FGSM": 15, "PGD": 15, "Free": 88}  # epochs (Figure 2, Table 3)
SCHEDULES = {  # Figure 1: (schedule, epochs)
    "CIFAR-10": (Cyclic(name="cyclic", max_lr=0.21, peak=0.4), 15),
    "ImageNet": (Points(name="points", points=((0, 0), (1, 0.4), (6, 0.04), (12, 0.004), (15, 0.0004))), 15),
}


def _two(clean: float, robust: float, more: float | None = None) -> dict:
    return {"clean": clean, "robust": robust} | ({} if more is None else {"robust1": more})


def _time(epochs: int, seconds: float, minutes: float) -> dict:
    return {"epochs": epochs, "seconds_per_epoch": seconds, "minutes": minutes}


TABLE1 = {  # label: figures
    "FGSM, zero init": _two(81.48, 0.00),
    "FGSM, previous init": _two(85.60, 42.32),
    "FGSM, random init": _two(84.38, 43.78),
    "FGSM, random init, alpha = 1.25 epsilon": _two(83.25, 46.25),
    "FGSM, random init, alpha = 2 epsilon": _two(85.39, 0.00),
    "Free (m = 8)": _two(83.80, 46.78),
    "PGD": _two(83.04, 44.56),
}
TABLE2 = {
    "PGD": _two(99.20, 97.66, 89.90) | {"verified": 96.7},
    "FGSM": _two(99.20, 97.53, 88.77) | {"verified": 96.8},
}
TABLE3 = {"PGD": _time(15, 91.59, 23.14), "Free (m = 8)": _time(88, 13.46, 19.88), "FGSM": _time(15, 23.41, 6.02)}


def _full() -> dict[str, list[Row]]:
    one = [
        ("cifar10_fgsm_zero", "FGSM, zero init", 1),
        ("cifar10_fgsm_previous", "FGSM, previous init", 6),
        ("cifar10_fgsm_random", "FGSM, random init", 5),
        ("cifar10_fgsm", "FGSM, random init, alpha = 1.25 epsilon", 0),
        ("cifar10_fgsm_alpha16", "FGSM, random init, alpha = 2 epsilon", 2),
        ("cifar10_free", "Free (m = 8)", 90),
        ("cifar10_pgd", "PGD", 91),
    ]
    three = [("cifar10_pgd_fast", "PGD", 9), ("cifar10_free_fast", "Free (m = 8)", 8), ("cifar10_fgsm_fast", "FGSM", 3)]
    old = [  # run by the paper's authors from the code of others, on their hardware
        Row("pgd_7", "PGD-7 (Madry et al., 2017), their code", None, (), _time(205, 1456.22, 4965.71)),
        Row("free_205", "Free (Shafahi et al., 2019), their code", None, (), _time(205, 197.77, 674.39)),
    ]
    two = [
        Row("mnist_pgd", "PGD", "mnist_pgd.yaml", (), TABLE2["PGD"], 10),
        Row("mnist_fgsm", "FGSM", "mnist_fgsm.yaml", (), TABLE2["FGSM"], 4),
        Row("mnist_fgsm_warmup", "ours, not the paper's: FGSM, epsilon warmed up", "mnist_fgsm_warmup.yaml", (), {}, 7),
    ]

    def imagenet(method: str, config: str, epsilon: int, order: int, **figures) -> Row:
        label = f"{method}, epsilon = {epsilon}/255"
        return Row(config, label, f"{config}.yaml", (), figures, order)

    four = [
        imagenet("FGSM", "imagenet_3phase_eps2", 2, 80, clean=60.90, first=43.46, robust=43.43),
        imagenet("Free (m = 4)", "imagenet_free_eps2", 2, 93, clean=64.37, first=43.31, robust=43.28),
        imagenet("FGSM", "imagenet_3phase", 4, 81, clean=55.45, first=30.28, robust=30.18),
        imagenet("Free (m = 4)", "imagenet_free", 4, 92, clean=60.42, first=31.22, robust=31.08),
    ]

    def timed(label: str, row: Row, precision: str, order: int, phases: list, hours: float) -> Row:
        """The runs with mixed precision are Table 4's at epsilon = 2/255."""
        single = precision == "fp32"
        name, overrides = (f"{row.name}_fp32", ("precision=fp32",)) if single else (row.name, ())
        return Row(name, label, row.config, overrides, {"phases": phases, "hours": hours}, order)

    five = [
        timed("FGSM, single precision", four[0], "fp32", 94, [(6, 22.65), (6, 65.97), (3, 114.45)], 14.59),
        timed("Free (m = 4), single precision", four[1], "fp32", 95, [(92, 34.04)], 52.20),
        timed("FGSM, mixed precision", four[0], "fp16", 80, [(6, 20.07), (6, 53.39), (3, 95.93)], 12.14),
        timed("Free (m = 4), mixed precision", four[1], "fp16", 93, [(92, 25.28)], 38.76),
    ]
    return {
        "table1": [Row(name, label, f"{name}.yaml", (), TABLE1[label], order) for name, label, order in one],
        "table2": two,
        "table3": [Row(name, label, f"{name}.yaml", (), TABLE3[label], order) for name, label, order in three] + old,
        "table4": four,
        "table5": five,
        "seconds": [Row("fashion_mnist_fast", "Fashion-MNIST, epsilon 0.1", "fashion_mnist_fast.yaml", (), {}, 6)],
        "figure1": [],
        "figure2": _figure2(),
    }


def _figure2() -> list[Row]:
    """The runs of configs/sweeps/figure2.yaml. Those that are Table 3's too are called as there."""
    grids, rows = sweep.read_sweep(ROOT / "configs/sweeps/figure2.yaml"), []
    first = {"FGSM": 20, "Free": 30, "PGD": 40}  # of `order`
    for labels, keys in sweep.places(grids):
        method, epochs = dict(labels)["method"], keys["phases.0.epochs"]
        name = f"cifar10_{method.lower()}_fast"
        name = name if epochs == FIRST_TO_45[method] else f"{name}_{epochs}epochs"
        overrides = tuple(sweep.as_overrides(keys))
        rows.append(Row(name, method, Path(grids.config).name, overrides, {}, first[method] + len(rows)))
    return rows


MINIATURE = (
    "A miniature, not a reproduction: Fashion-MNIST, 3,000 training and 500 test images, the MNIST network, epsilon 0.25, "
    "PGD-20-1. It shows the order of the methods. The paper's columns belong to its own data and networks."
)


def _small() -> dict[str, list[Row]]:
    """Runs of `configs/fashion_mnist_small.yaml`: 20 epochs of FGSM unless something else is said."""

    def row(name: str, label: str, order: int, *overrides: str, paper: dict | None = None) -> Row:
        return Row(f"small_{name}", label, "fashion_mnist_small.yaml", overrides, paper or {}, order)

    zero, previous, far = ("method.init=zero",), ("method.init=previous",), ("method.alpha=0.5",)
    pgd = ("method={name: pgd, steps: 4, alpha: 0.125}", "epsilon_warmup=4")  # without the warm-up it stays at chance
    free = "method={name: free, replays: 4}"
    both = "evaluation.epsilon=[0.25, 0.1]"
    names = {  # label: (name, order, overrides, epochs of Figure 2; the last is Table 1's)
        "FGSM": ("random", 0, (both,), (5, 10, 20)),
        "Free": ("free", 4, (free,), (8, 16, 32)),
        "PGD": ("pgd", 5, (*pgd, both), (5, 7, 10)),
    }

    def of(label: str, figure: str, paper: dict, epochs: int = -1) -> Row:
        name, order, overrides, all_epochs = names[label]
        n = all_epochs[epochs]
        return row(
            name if n == all_epochs[-1] else f"{name}_{n}epochs",
            figure,
            order if n == all_epochs[-1] else order + 10,
            *overrides,
            f"phases.0.epochs={n}",
            paper=paper,
        )

    twice = "FGSM, random init, alpha = 2 epsilon"
    return {
        "table1": [
            row("zero", "FGSM, zero init", 1, *zero, paper=TABLE1["FGSM, zero init"]),
            row("previous", "FGSM, previous init", 3, *previous, paper=TABLE1["FGSM, previous init"]),
            of("FGSM", "FGSM, random init", TABLE1["FGSM, random init"]),
            row("alpha2", twice, 2, *far, paper=TABLE1[twice]),
            of("Free", "Free (m = 4; the paper: 8)", TABLE1["Free (m = 8)"]),
            of("PGD", "PGD (4 steps, epsilon warmed up; the paper: 8)", TABLE1["PGD"]),
        ],
        "table2": [of("PGD", "PGD", TABLE2["PGD"]), of("FGSM", "FGSM", TABLE2["FGSM"])],
        "table3": [
            of("PGD", "PGD", TABLE3["PGD"]),
            of("Free", "Free", TABLE3["Free (m = 8)"]),
            of("FGSM", "FGSM", TABLE3["FGSM"]),
        ],
        "figure1": [],
        "figure2": [of(label, label, {}, i) for label in names for i in (0, 1, 2)],
    }


ROWS: dict[str, dict[str, list[Row]]] = {"full": _full(), "small": _small()}
