"""Result packages against scikit-learn, sacrebleu, rouge-score and references written out by hand. All on the CPU."""

import math
import os
import warnings

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCohenKappa

from helpers.chapters import evaluation
from helpers.training import TrainLoop
from servers import free_port

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(No positive samples|Average precision):UserWarning"),
]


# --------------------------------------------------------------------------------------- data, the same in any process


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def classes():
    """Logits of 5 classes with many ties, a class (4) that never occurs and one (3) that is never predicted.

    In the last batches they are all within 0 and 1, where they look like probabilities.
    """
    logits = torch.randint(-3, 4, (43, 5), generator=random()) / 2
    logits[34:] = torch.randint(1, 5, (9, 5), generator=random(2)) / 4
    logits[:, 3] = torch.where(torch.arange(43) < 34, -9.0, 0.0)
    return logits, torch.randint(4, (43,), generator=random(1))


def yes_or_no():
    """Logits with ties, all within 0 and 1 in the last batches."""
    logits = torch.randint(-20, 21, (43,), generator=random()) / 10
    logits[30:] = torch.randint(0, 10, (13,), generator=random(2)) / 10
    return logits, torch.randint(2, (43,), generator=random(1))


def numbers():
    targets = torch.randn(43, generator=random()) * 10 + 2000
    return targets + torch.randn(43, generator=random(1)) * 5, targets


def texts():
    """Texts of few words, so that n-grams match, with case, punctuation, numbers, articles; some empty or the same."""
    words = "the The a cat cat, sat on mat. don't 3.5 1,000 e-mail ! café x&y".split()
    picks = torch.randint(len(words), (43, 3, 12), generator=random())
    lengths = torch.randint(0, 13, (43, 3), generator=random(1))
    say = lambda pick, length: " ".join(words[i] for i in pick[:length])
    lines = [[*map(say, *row)] for row in zip(picks.tolist(), lengths.tolist())]
    outputs = [row[0] for row in lines]
    targets = [row[1:] if n % 2 else row[1] for n, row in enumerate(lines)]  # two are right, or one
    outputs[:6] = ["", "the", "", "a cat sat on", "Cat", "a"]
    targets[:6] = ["", "", "cat", "a cat sat on", "the cat!", "x"]
    for n in range(6, 20):  # half right
        outputs[n] = lines[n][1][: 3 * n // 2] + outputs[n][:5]
    return outputs, targets


def spans():
    logits = torch.randint(-2, 3, (43, 9, 2), generator=random()).float()
    logits[5:20, 6:] = -torch.inf  # padding
    return logits, torch.randint(6, (43, 2), generator=random(1)).sort(dim=1).values


def tokens():
    logits = torch.randn(43, 7, 11, generator=random()) * 3
    logits[2] *= 100  # sure, and mostly wrong
    targets = torch.randint(11, (43, 7), generator=random(1))
    targets[torch.rand(43, 7, generator=random(2)) < 0.4] = -100
    targets[10:20] = -100  # among them a batch without any token
    return logits / 10, targets


def scores():
    """Similarities with many ties, most below 0, higher for most of the right ones."""
    similarities, targets = torch.randint(-6, 3, (43, 20), generator=random()) / 4, torch.arange(43) % 20
    similarities[torch.arange(43), targets] += torch.randint(6, (43,), generator=random(1)) / 4
    return similarities, targets


PACKAGES = {
    "classification": (lambda: evaluation.classification(5), classes),
    "binary": (lambda: evaluation.binary(0.6), yes_or_no),
    "regression": (evaluation.regression, numbers),
    "question answering": (evaluation.question_answering, texts),
    "spans": (evaluation.question_answering_spans, spans),
    "summarisation": (evaluation.summarisation, texts),
    "translation": (evaluation.translation, texts),
    "language modelling": (evaluation.language_modelling, tokens),
    "retrieval": (evaluation.retrieval, scores),
}
SIZES = (1, 8, 8, 1, 8, 8, 7, 2)  # uneven batches, 43 in all


def batches(data):
    ends = np.cumsum(SIZES)
    return [tuple(column[end - size : end] for column in data) for size, end in zip(SIZES, ends)]


def values(package, *parts):
    """What a package says of some batches."""
    for part in parts:
        package.update(*part)
    return {name: value.tolist() for name, value in package.compute().items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def mean(rows):
    """The mean of each column of rows of dicts."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


# ------------------------------------------------------------------------------------------------- against references


def test_classification_is_scikit_learns():
    logits, targets = classes()
    assert set(targets.tolist()) == {0, 1, 2, 3} and 3 not in logits.argmax(1) and 4 in logits.argmax(1)
    predicted, probabilities = logits.argmax(1), logits.softmax(1).numpy()

    def over_classes(score):
        return np.average([score(targets == c, probabilities[:, c]) for c in range(4)], weights=np.bincount(targets))

    with warnings.catch_warnings(action="ignore"):
        expected = {
            "accuracy": sk.accuracy_score(targets, predicted),
            "precision": sk.precision_score(targets, predicted, average="macro", zero_division=0),
            "recall": sk.recall_score(targets, predicted, average="macro", zero_division=0),
            "f1": sk.f1_score(targets, predicted, average="macro", zero_division=0),
            "roc_auc": over_classes(sk.roc_auc_score),
            "pr_auc": over_classes(sk.average_precision_score),
            "confusion_matrix": sk.confusion_matrix(targets, predicted, labels=range(5)),
        }
    same(values(evaluation.classification(5), (logits, targets)), expected)


def test_binary_is_scikit_learns():
    logits, targets = yes_or_no()
    probabilities = logits.sigmoid()
    for threshold in 0.6, 0.9999:
        predicted = (probabilities > threshold).int()
        expected = {
            "accuracy": sk.accuracy_score(targets, predicted),
            "precision": sk.precision_score(targets, predicted, zero_division=0),
            "recall": sk.recall_score(targets, predicted),
            "f1": sk.f1_score(targets, predicted),
            "roc_auc": sk.roc_auc_score(targets, probabilities),
            "pr_auc": sk.average_precision_score(targets, probabilities),
            "confusion_matrix": sk.confusion_matrix(targets, predicted),
        }
        same(values(evaluation.binary(threshold), (logits, targets)), expected)
        same(values(evaluation.binary(threshold), (logits[:, None], targets[:, None].float())), expected)


def test_regression_is_scikit_learns():
    three_a_sample = [column[:42].reshape(14, 3) * torch.tensor([1.0, 2.0, 0.5]) for column in numbers()]
    large_beside_the_spread = torch.tensor([1001.0, 1000.0, 999.5]), torch.tensor([1001.0, 1000.0, 999.0])
    for data in numbers(), three_a_sample, large_beside_the_spread:
        outputs, targets = (column.double().numpy() for column in data)
        expected = {
            "mse": sk.mean_squared_error(targets, outputs),
            "mae": sk.mean_absolute_error(targets, outputs),
            "r2": sk.r2_score(targets, outputs),
        }
        same(values(evaluation.regression(), data), expected)


def several(target):
    return [target] if isinstance(target, str) else target


def test_question_answering_is_squads():
    rows = [  # output, one or several right answers, exact match, f1
        ("The Eiffel-Tower!", "an eiffeltower", 1, 1),  # case, punctuation and articles do not count
        ("in 1889", ["1889", "the year 1889"], 0, 2 / 3),  # the best of them
        ("a cat sat on mat", "on the mat, a dog sat", 0, 2 * 3 / (4 + 4)),
        ("cat cat", "cat", 0, 2 / 3),
        ("", [], 1, 1),
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("cat", [], 0, 0),
        ("", "cat", 0, 0),
    ]
    for output, target, exact, f1 in rows:
        same(values(evaluation.question_answering(), ([output], [target])), {"exact_match": exact, "f1": f1})
    with pytest.raises(ValueError):
        evaluation.question_answering().update(["one", "two"], ["one"])


def test_spans_are_the_best_pair():
    logits, targets = spans()
    rows = []
    for (first_logits, last_logits), (first, last) in zip(logits.transpose(1, 2).tolist(), targets.tolist()):
        pairs = [(i, j) for i in range(9) for j in range(i, 9)]
        found = max(pairs, key=lambda pair: first_logits[pair[0]] + last_logits[pair[1]])
        output, target = set(range(found[0], found[1] + 1)), set(range(first, last + 1))
        f1 = 2 * len(output & target) / (len(output) + len(target))
        rows.append({"span_accuracy": output == target, "span_f1": f1})
    same(values(evaluation.question_answering_spans(), (logits, targets)), mean(rows))
    likely = torch.full((1, 9, 2), -5.0)
    likely[0, 3, 0], likely[0, 5, 1], likely[0, 1, 1] = 5, 5, 7  # the likeliest last token is before the first
    found = values(evaluation.question_answering_spans(), (likely, torch.tensor([[3, 5]])))
    same(found, {"span_accuracy": 1, "span_f1": 1})


def test_summarisation_is_rouge_scores():
    outputs, targets = texts()
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(several(target), output) for output, target in zip(outputs, targets)]
    expected = mean([{name: score.fmeasure for name, score in row.items()} for row in scores])
    assert 0.05 < expected["rouge2"] < expected["rouge1"] < 0.95
    same(values(evaluation.summarisation(), (outputs, targets)), expected)


def test_translation_is_sacrebleus():
    outputs, targets = texts()
    references = [[several(target)[n] if n < len(several(target)) else None for target in targets] for n in range(2)]
    sentences = [sacrebleu.sentence_bleu(*pair).score / 100 for pair in zip(outputs, map(several, targets))]
    bleu = sacrebleu.corpus_bleu(outputs, references).score / 100
    expected = {"bleu": bleu, "sentence_bleu": np.mean(sentences)}
    assert 0.05 < expected["bleu"] < 0.95
    same(values(evaluation.translation(), (outputs, targets)), expected)
    none = values(evaluation.translation(), (["a cat sat"], ["a cat lay"]))  # no four words in a row
    assert none["bleu"] == 0 < none["sentence_bleu"]


def test_language_modelling_is_the_mean_over_all_tokens():
    logits, targets = tokens()
    log_probabilities = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    losses = [-log_probabilities[i, j, targets[i, j]].item() for i in range(43) for j in range(7) if targets[i, j] >= 0]
    loss = sum(losses) / len(losses)
    found = values(evaluation.language_modelling(), *batches((logits, targets)))
    same(found, {"cross_entropy_loss": loss, "perplexity": math.exp(loss)})
    sure = torch.tensor([[[200.0, 0.0], [0.0, 0.0]]]).bfloat16()  # a softmax in float32 is 0 here
    found = values(evaluation.language_modelling(), (sure, torch.tensor([[1, 0]])))
    assert found["cross_entropy_loss"] == pytest.approx((200 + math.log(2)) / 2)


def test_retrieval_is_by_rank():
    similarities, targets = scores()
    ranks = [
        1 + sum(score >= row[right] for i, score in enumerate(row) if i != right)
        for row, right in zip(similarities.tolist(), targets.tolist())
    ]
    expected = {f"recall@{k}": np.mean([rank <= k for rank in ranks]) for k in (1, 3, 10)}
    expected["mrr"] = np.mean([1 / rank for rank in ranks])
    assert 0 < expected["recall@1"] < expected["recall@3"] < expected["recall@10"] < 1
    same(values(evaluation.retrieval(), (similarities, targets)), expected)
    similarities = torch.tensor([[-0.1, -0.2, -0.3], [-0.2, -0.4, -0.1], [-0.3, -0.9, -0.2]])
    same(values(evaluation.retrieval((1, 2)), (similarities,)), {"recall@1": 2 / 3, "recall@2": 2 / 3, "mrr": 7 / 9})
    for nothing in (torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        same(values(evaluation.retrieval((1, 2)), (nothing,)), {"recall@1": 0, "recall@2": 0, "mrr": 1 / 3})


# ------------------------------------------------------------------------------ batches, processes, the training loop


def test_packages_in_one_collection_keep_their_values():
    """A MetricCollection merges metrics whose states look the same, as those of these two do after the first batch."""
    parts, right = {"first": (1,), "five": (5,)}, torch.eye(3)
    found = values(
        MetricCollection({name: evaluation.retrieval(ks) for name, ks in parts.items()}), (right,), (-right,)
    )
    for name, ks in parts.items():
        alone = values(evaluation.retrieval(ks), (right,), (-right,))
        same({key: found.pop(f"{name}_{key}") for key in alone}, alone)
    together = MetricCollection([evaluation.translation(), evaluation.question_answering()])
    alone = [values(package(), texts()) for package in (evaluation.translation, evaluation.question_answering)]
    same(values(together, *batches(texts())), alone[0] | alone[1])


def loop_values(metrics, data):
    """The metrics through a training loop, of a model that gives its inputs."""
    model = nn.PReLU(init=1)  # with a parameter: several processes take no model without
    loop = TrainLoop(model, metrics=metrics, criterion=F.cross_entropy)
    return loop.evaluate(DataLoader(TensorDataset(*data), batch_size=8))


def test_a_package_and_one_of_ones_own_through_the_training_loop():
    logits, targets = classes()
    found = loop_values(evaluation.classification(5), (logits, targets))
    assert found.pop("loss") == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert isinstance(found["accuracy"], float)
    same(found, values(evaluation.classification(5), (logits, targets)))
    own, expected = {"kappa": MulticlassCohenKappa(5)}, sk.cohen_kappa_score(targets, logits.argmax(1))
    assert loop_values(own, (logits, targets))["kappa"] == pytest.approx(expected, abs=1e-5)


def in_a_process(rank, port, results):
    """One of two: the first gets every third batch, so both have some, of different number and size."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for name, (package, data) in PACKAGES.items():
        mine, metric = [part for n, part in enumerate(batches(data())) if (n % 3 == 0) == (rank == 0)], package()
        values(metric, *mine[1:])
        metric.reset()
        found[name] = values(metric, *mine)
    found["loop"] = loop_values(evaluation.classification(5), classes())
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives_and_the_loop_counts_every_sample_once(tmp_path):
    given = str(free_port()), tmp_path
    torch.multiprocessing.start_processes(in_a_process, given, nprocs=2, start_method="fork")
    logits, targets = classes()
    expected = {name: values(package(), data()) for name, (package, data) in PACKAGES.items()}
    expected["loop"] = expected["classification"] | {"loss": F.cross_entropy(logits, targets).item()}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name in expected:
            same(found[name], expected[name])
