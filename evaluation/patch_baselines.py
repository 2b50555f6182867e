"""The predictors that a network of patches has to beat: on the same slides, with the same inputs,
targets and scores."""

import copy

import numpy as np

from evaluation import bags, baselines, hest
from evaluation.genes import score, score_row, train_queue
from evaluation.samples import predict
from plainst import run
from plainst.jobs import Jobs

# --------------------------------------------------------------------------------------------------
# Of the spot alone, and of its place alone
# --------------------------------------------------------------------------------------------------


def training_rows(samples, values):
    """x (N, F) of values [(S, F)] and y (N, G) float64 of the scored spots, genes that a slide
    lacks at their mean, and that mean (G,)."""
    x = hest.scored_rows(samples, values, np.float64)
    y = hest.scored_rows(samples, [s.y for s in samples], np.float64)
    measured = [np.tile(s.measured.numpy(), (int(s.scored.sum()), 1)) for s in samples]
    y, mean = hest.fill_unmeasured(y, np.concatenate(measured))
    return x, y, mean


def classical_baselines(fit, test):
    """{name: [prediction (S, G) per test sample]} of the training mean, coordinates, both ridges of
    the HEST benchmark and kNN. fit, test: [Sample], features unscaled."""
    x, y, mean = training_rows(fit, [s.x for s in fit])
    tests = [s.x.double().numpy() for s in test]
    return {
        "train_mean": [np.tile(mean, (len(t), 1)) for t in tests],
        "coordinates": [of_place(fit, s) for s in test],
        **baselines.feature_baselines(x, y, tests),
    }


def of_place(fit, sample):
    """Prediction (S, G) from coordinates alone: the nearest training spots by place where another
    section of the patient trains, by distance from the slide's middle elsewhere."""
    same = [s for s in fit if s.patient and s.patient == sample.patient]
    sources, place = (same, lattice_place) if same else (fit, radius)
    x, y, _ = training_rows(sources, [place(s) for s in sources])
    return baselines.nearest_spots(x, y).predict(place(sample))


def lattice_place(sample):
    """(S, 2) place in pitches from the slide's middle."""
    return sample.place.double().numpy()


def radius(sample):
    """(S, 1) distance from the slide's middle, 1 at the farthest spot."""
    distance = np.linalg.norm(lattice_place(sample), axis=1, keepdims=True)
    return distance / max(distance.max(), 1e-9)


# --------------------------------------------------------------------------------------------------
# Ridge on the inputs of the network
# --------------------------------------------------------------------------------------------------

PENALTIES = np.logspace(0, 6, 13)
# channels an axis of the sinusoids of a place
N_CHANNELS = 32


def own(sample):
    """(S, F) features of the spot, scaled as the network reads them."""
    return sample.x.double().numpy()


def with_rings(sample):
    """(S, F (1 + rings)): the spot's own beside the mean features of every ring around it."""
    parts = [own(sample)]
    for ring in range(1, int(sample.ring.max()) + 1):
        is_read = sample.ring == ring
        # a spot without a neighbour in the ring stands for it
        is_read[:, 0] |= ~is_read.any(1)
        parts.append(baselines.neighbour_mean(sample.x, sample.table, is_read).double().numpy())
    return np.concatenate(parts, 1)


def with_place(sample):
    """(S, F (1 + rings) + 2 N_CHANNELS): the same beside the sinusoids of the place."""
    omega = 10000 ** (-np.arange(0, N_CHANNELS, 2) / N_CHANNELS)
    angle = (lattice_place(sample)[..., None] * omega).reshape(len(sample.x), -1)
    return np.concatenate([with_rings(sample), np.sin(angle), np.cos(angle)], 1)


INPUTS = {"ridge_own": own, "ridge_rings": with_rings, "ridge_rings_place": with_place}


class ChosenRidge:
    """Ridge on `inputs`(sample) whose penalty has the best mean PCC on the inner parts (patients,
    or sections where there is one patient)."""

    def __init__(self, inputs, inner):
        self.inputs, self.penalty = inputs, PENALTIES[len(PENALTIES) // 2]
        if not inner:
            return
        curves = []
        for part in inner:
            path = self.path(part.fit, part.val, PENALTIES)
            curves.append([hest.score(part.val, values)["pcc_mean"] for values in path])
        self.penalty = PENALTIES[np.mean(curves, 0).argmax()]

    def path(self, fit, samples, penalties):
        """[[prediction (S, G) of every sample] of every penalty], fitted on the samples `fit`."""
        x, y, _ = training_rows(fit, [self.inputs(s) for s in fit])
        return baselines.ridge_path(x, y, [self.inputs(s) for s in samples], penalties)

    def predict(self, fit, samples):
        """[prediction (S, G) of every sample]."""
        return self.path(fit, samples, [self.penalty])[0]


# --------------------------------------------------------------------------------------------------
# Networks without pathways
# --------------------------------------------------------------------------------------------------


def baseline_flags(config, is_bag):
    """The flags of a network without pathways: it predicts values in units of their spread, not a
    likelihood's parameters, and one layer from zero needs larger steps."""
    flags = copy.copy(config)
    flags.lambda_pathway, flags.bf16, flags.compile = 0.0, False, False
    if config.loss == "zinb" or is_bag:
        flags.loss = "mse"
    if config.target_scale == "none":
        flags.target_scale = "train"
    flags.lr, flags.optimiser, flags.epochs = max(flags.lr, 1e-2), "adamw", min(flags.epochs, 30)
    if is_bag:
        flags.members, flags.batch, flags.lr = 1, 1, max(config.lr, 3e-3)
    return flags


def trained_baselines(task, train, device):
    """{name: [prediction per test sample]} of the networks of `bags`, trained as the model is."""

    def train_network(name, network):
        is_bag = name in bags.BAGS
        flags = baseline_flags(task.config, is_bag)

        def make(part):
            return network(*part.widths(flags)[:2])

        inner = [] if is_bag else task.inner_parts(flags.folds)
        queue = Jobs(flags, is_shared=True)
        models, _ = train_queue(queue, train, make, task.all, inner, flags, device, is_bag)
        return models, [predict(models, s, task.all.scaler, flags)[0] for s in task.test]

    return bags.trained_baselines(task.test, train_network)[0]


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def score_baselines(task, train, device):
    """{name: scores} of every baseline, and the ridge that reads all that the network reads; prints
    a row for each."""
    fit, test = ([task.raw[n] for n in names] for names in (task.train_names, task.test_names))
    predictions, inner = classical_baselines(fit, test), task.inner_parts(5)
    ridges = {name: ChosenRidge(inputs, inner) for name, inputs in INPUTS.items()}
    for name, ridge in ridges.items():
        predictions[name] = ridge.predict(task.all.fit, task.test)
    predictions |= trained_baselines(task, train, device)
    scores = {name: score(task.test, p, task.rates) for name, p in predictions.items()}
    for name in scores:
        run.say(score_row(name, scores[name]))
    return scores, ridges["ridge_rings_place"]


# share of the ridge
WEIGHTS = np.linspace(0, 1, 11)


def average_row(task, result, inner, ridge):
    """{"average_with_ridge": scores} of the network averaged with the ridge, whose share has the
    best mean PCC on the `inner` parts [(Part, network)]; prints its row. Empty without inner parts,
    and for the mean of a slide."""
    if not inner or task.is_bag:
        return {}
    curves = []
    for part, model in inner:
        network = [predict([model], s, part.scaler, task.config)[0] for s in part.val]
        linear = ridge.predict(part.fit, part.val)
        averages = [mixed(network, linear, weight) for weight in WEIGHTS]
        curves.append([hest.score(part.val, values)["pcc_mean"] for values in averages])
    weight = float(WEIGHTS[np.mean(curves, 0).argmax()])
    linear = ridge.predict(task.all.fit, task.test)
    scores = score(task.test, mixed(result.predictions, linear, weight), task.rates)
    scores["ridge_share"] = weight
    run.say(score_row(f"average, ridge {weight:.1f}", scores))
    return {"average_with_ridge": scores}


def mixed(network, linear, weight):
    """[(S, G)] averages of two lists of predictions; weight: of the second."""
    return [(1 - weight) * a + weight * b for a, b in zip(network, linear)]
