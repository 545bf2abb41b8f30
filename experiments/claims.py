"""The claims of the papers, in our words, and what here bears on each: the table of docs/results/index.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments import attention, convmixer, filters, recall, robustness
from experiments.evidence import Judge, across, better, extra_better, not_run, reaches, sooner, weakest, wider_window
from experiments.experiment import Experiment
from experiments.measured import leans, near_one, structured

SSM = "mimetic SSMs (2410.11135)"
ATTENTION = "mimetic attention (2305.09828)"
FILTERS = "filter covariances (2210.03651)"
CONVMIXER, CAYLEY = "ConvMixer (2201.09792)", "Cayley layers (2104.07167)"


@dataclass(frozen=True)
class Claim:
    """One row of the table."""

    key: str
    paper: str
    says: str
    setting: str
    """What was run here, and how far it is from the paper's setting."""
    judge: Judge = not_run
    page: str = ""
    """The page that shows it."""
    experiments: Sequence[Experiment] = ()
    measured: str = ""
    """What of ``experiments/measured.py`` it rests on."""

    @property
    def command(self) -> str:
        """The command that adds to its records."""
        if self.measured:
            return f"`python experiments/measured.py {self.measured}`"
        if not self.experiments:
            return "–" if self.judge is not_run else "`make gpu`"
        names = [experiment.name for experiment in self.experiments]
        more = f" … ({len(names)} studies)" if len(names) > 3 else ""
        return f"`python experiments/queue.py --only {' '.join(names[:3])}`{more}"


NETS = {"mamba2": "Mamba-2", "mamba1": "Mamba-1", "hybrid": "hybrid"}
FILTER_NETS = dict(
    zip(
        ("kernel 9, patch 2", "kernel 5, patch 2", "kernel 9, patch 4", "kernel 5, patch 4"), filters.WORTH, strict=True
    )
)
FILTER_NETS["ConvNeXt"] = filters.CONVNEXT
TRANSFERS = dict(zip(("twice the depth", "twice the width", "patch 4", "kernel 5"), filters.TRANSFER, strict=True))

CLAIMS: Sequence[Claim] = (
    Claim(
        "S1.1",
        SSM,
        "A state-space model that starts like attention learns to copy more easily.",
        "Mamba-1, 2 layers, width 64, strings of up to 12 symbols, 600 steps, 8 rates, best against best; the paper: "
        "strings of 50 and more, wider and deeper, longer training",
        better(recall.WINDOW, "mimetic-ssm", "default"),
        "recall.md",
        [recall.WINDOW],
    ),
    Claim(
        "S1.2",
        SSM,
        "… and associative recall.",
        "multi-query recall at zoology's length 64, 4 pairs, vocabulary 8,192, width 64; 2,000 steps of 64, a fiftieth "
        "of zoology's examples",
        weakest([better(each, "mimetic-ssm", "default", NETS[net]) for net, each in recall.MQAR.items()]),
        "recall.md",
        [*recall.MQAR.values(), recall.CONTROL],
    ),
    Claim(
        "S1.3",
        SSM,
        "… across architectures.",
        "copying as in S1.1; Mamba-1 and Mamba-2, 1, 2 and 4 layers, state 16 and 64, width 64 and 128, two rates",
        across(recall.ACROSS, "mimetic-ssm", "default"),
        "recall.md",
        recall.ACROSS,
    ),
    Claim(
        "S1.4",
        SSM,
        "… because its layers can mimic attention.",
        "S1.1's runs: share of the mixing matrix's weight that lies on the lag that copying needs, in the best layer, "
        "after training and at the start",
        extra_better(recall.WINDOW, "mimetic-ssm", "default", ("right lag, end", "right lag, start")),
        "recall.md",
        [recall.WINDOW],
    ),
    Claim(
        "S1.5",
        SSM,
        "… and generalises to longer strings.",
        "S1.1's runs on strings of 2 and 4 times the training length",
        extra_better(recall.WINDOW, "mimetic-ssm", "default", ("test_2x/accuracy", "test_4x/accuracy")),
        "recall.md",
        [recall.WINDOW],
    ),
    Claim(
        "S2.1",
        ATTENTION,
        "Vision transformers on CIFAR-10 end higher.",
        "all 50,000 images, 192 wide, 6 layers, patch 4, 12 epochs, crop and flip, bf16, three rates; the paper: 12 "
        "layers, patch 2, hundreds of epochs, strong augmentation",
        better(attention.CIFAR10, "mimetic", "default"),
        "attention.md",
        [attention.CIFAR10],
    ),
    Claim(
        "S2.2",
        ATTENTION,
        "… and train faster.",
        "S2.1's runs: epochs until a run passes the final score of the default start with the same seed",
        sooner(attention.CIFAR10, "mimetic", "default"),
        "attention.md",
        [attention.CIFAR10],
    ),
    Claim("S2.3", ATTENTION, "… and on ImageNet.", "no copy of ImageNet is at hand, and no GPU for its days"),
    Claim(
        "S2.4",
        ATTENTION,
        "… because pre-trained attention looks so.",
        "the one pre-trained model that a package index serves, a language model of 6 layers (MiniLM); the paper: "
        "vision transformers; n counts layers",
        leans,
        "measured.md",
        measured="pretrained-attention --model FOLDER",
    ),
    Claim(
        "S3.1",
        FILTERS,
        "Learned filters have a structured covariance.",
        "ConvMixer-48/4 (kernel 9, patch 2), all 50,000 images, 15 epochs, two seeds; the closed form against white "
        "noise; n counts layers of nets",
        structured,
        "measured.md",
        measured="trained-filters",
    ),
    Claim(
        "S3.2",
        FILTERS,
        "The covariances of small nets start larger ones well.",
        "S3.1's nets pooled, to twice the depth, twice the width, patch 4 and kernel 5, on 2,000 images, 8 epochs, "
        "against torch's filters; the paper: wider and deeper nets, all images, longer training",
        weakest([better(each, "transferred", "default", place) for place, each in TRANSFERS.items()]),
        "filters.md",
        filters.TRANSFER,
    ),
    Claim(
        "S3.3",
        FILTERS,
        "The closed form beats starts that treat every weight alike.",
        "ConvMixer-48/4 (kernels 9 and 5 on patches of 2 and 4) and a small ConvNeXt on 2,000 images, 8 epochs; the "
        "paper: wider and deeper nets, all images, longer training",
        weakest([better(each, "covariance", "default", place) for place, each in FILTER_NETS.items()]),
        "filters.md",
        [*FILTER_NETS.values()],
    ),
    Claim(
        "S3.4",
        FILTERS,
        "Structured filters that stay frozen can beat filters that are trained.",
        "as S3.3; frozen closed form against torch's filters, trained",
        weakest([better(each, "covariance-frozen", "default", place) for place, each in FILTER_NETS.items()]),
        "filters.md",
        [*FILTER_NETS.values()],
    ),
    Claim(
        "S4.1",
        CONVMIXER,
        "At equal parameters and data it beats ViT, MLP-Mixer and ResNet.",
        "0.3 million parameters each, 10,000 CIFAR-10 images, 10 epochs, crop and flip, four rates for each; the "
        "paper: 20 to 50 million, ImageNet, 150 epochs and more",
        weakest([better(convmixer.EQUAL_PARAMETERS, *pair) for pair in convmixer.EQUAL_PARAMETERS.pairs]),
        "convmixer.md",
        [convmixer.EQUAL_PARAMETERS],
    ),
    Claim(
        "S4.2",
        CONVMIXER,
        "The published recipe reaches 92.6 % after 25 epochs.",
        "as published, on a GPU in bf16 (`make gpu`); n counts runs",
        reaches("convmixer_cifar10", "default", 0.926),
    ),
    Claim(
        "S4.3",
        CONVMIXER,
        "Patches are part of the reason: at equal cost, nets on patches end higher than nets on pixels.",
        "patches of 2 and 4 pixels against single pixels at equal multiply-adds, ConvMixer (5,000 images) "
        "and ViT (2,500)",
        weakest(
            [
                better(convmixer.PATCHES[net], f"patch-{patch}", "patch-1", place)
                for net, place in (("convmixer", "ConvMixer"), ("vit", "ViT"))
                for patch in (2, 4)
            ]
        ),
        "convmixer.md",
        [*convmixer.PATCHES.values()],
    ),
    Claim(
        "S5.1",
        CAYLEY,
        "Layers are orthogonal to high degree, also large convolutions.",
        "14 shapes, kernels of 1 to 31 taps, up to 128 channels, after 50 steps of Adam at 0.05; n counts shapes",
        near_one,
        "measured.md",
        measured="orthogonality",
    ),
    Claim(
        "S5.2",
        CAYLEY,
        "Nets of them are better certified than nets of other deterministic layers.",
        "our patch net on Fashion-MNIST with Cayley, AOC (at stride 1 BCOP's block construction, on patches RKO) "
        "and SOC convolutions, certified accuracy at 36/255, rates swept, at equal epochs and at equal time, and on "
        "CIFAR-10 at the two rates found (4 epochs of AOC and SOC); the paper: KWLarge and ResNet9 on CIFAR-10, 200 "
        "epochs, BCOP, RKO",
        weakest(
            [
                better(each, "cayley", other, place)
                for place, each in (("equal epochs", robustness.EQUAL_EPOCHS), ("equal time", robustness.EQUAL_TIME))
                for other in ("aoc", "soc")
            ]
            # Epochs stand in the names of the arms: the first two pairs have as many, the others take as long.
            + [
                better(robustness.LAYERS_CIFAR10, *pair, f"CIFAR-10, equal {what}")
                for pair, what in zip(
                    robustness.LAYERS_CIFAR10.pairs, ("epochs", "epochs", "time", "time"), strict=True
                )
            ]
        ),
        "robustness.md",
        [robustness.EQUAL_EPOCHS, robustness.EQUAL_TIME, robustness.LAYERS_CIFAR10],
    ),
    Claim(
        "S5.3",
        CAYLEY,
        "They scale to larger nets: wider and deeper ones are better certified.",
        "patch nets on Fashion-MNIST, 5 epochs, 36/255: width 64 against 16, depth 4 against 1; time and memory are on "
        "[another page](measured.md); the paper: ResNet9, WideResNet10-10 on CIFAR-10",
        weakest([better(robustness.SCALE, *pair) for pair in robustness.SCALE.pairs]),
        "robustness.md",
        [robustness.SCALE],
    ),
    Claim(
        "S5.4",
        CAYLEY,
        "KWLarge: 75.3 % clean and 59.2 % certified after 200 epochs.",
        "the published recipe with as many epochs as four minutes of a GPU hold, certified; n counts runs; what it "
        "reaches after 1 and 10 minutes of one core, rates swept, is on the page",
        reaches("certified_at_equal_time", "kwlarge_cifar10", 0.592, "certified_36"),
        "robustness.md",
    ),
    Claim(
        "own 1",
        "ours",
        "The mimetic start of SSMs widens the learning-rate window.",
        "S1.1's runs: ratio of the widths of the windows, bootstrap over seeds, by two definitions",
        wider_window(recall.WINDOW, "mimetic-ssm", "default"),
        "recall.md",
        [recall.WINDOW],
    ),
    Claim(
        "own 2",
        "ours",
        "A patch net is better certified than KWLarge after the same minutes of training.",
        "1 and 10 minutes of one core on Fashion-MNIST and CIFAR-10 (epochs from the time of a step), 36/255, rates "
        "swept",
        weakest(
            [
                better(each, *pair, robustness.NAMES[dataset])
                for dataset, each in robustness.MINUTES.items()
                for pair in each.pairs
            ]
        ),
        "robustness.md",
        [*robustness.MINUTES.values(), *robustness.HOURS.values()],
    ),
)
