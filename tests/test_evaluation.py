"""Metric packages against scikit-learn, sacrebleu, rouge-score and references written out by hand. All on the CPU."""

import math
import os
import random

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

from helpers.chapters import evaluation
from helpers.training import TrainLoop
from servers import free_port


# --------------------------------------------------------------------------------------- data, the same in any process


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def classes():
    """Logits of 4 classes with many ties; in the last batches within 0 and 1, where they look like probabilities."""
    logits = torch.randint(-3, 4, (43, 4), generator=seeded(0)) / 2
    logits[34:] = torch.randint(1, 5, (9, 4), generator=seeded(2)) / 4
    return logits, torch.randint(4, (43,), generator=seeded(1))


def yes_or_no():
    """The same for two classes, each in a column of its own."""
    logits, targets = classes()
    return logits[:, :1], targets[:, None] % 2.0


def numbers():
    """Three a sample, large beside their spread."""
    targets = torch.randn(43, 3, generator=seeded(0)) + torch.tensor([1000, 2000, 0])
    return targets + torch.randn(43, 3, generator=seeded(1)), targets


def texts():
    """Texts of few words, so that n-grams match; for every other one two references. Some are empty."""
    draw = random.Random(0)
    say = lambda: " ".join(
        draw.choices("the The a cat cat, sat on mat. 3.5 1,000 e-mail café".split(), k=draw.randrange(12))
    )
    outputs = [say() for _ in range(43)]
    return outputs, [[f"{text} {say()}", say()] if n % 2 else say() for n, text in enumerate(outputs)]


def spans():
    logits = torch.randint(-2, 3, (43, 9, 2), generator=seeded(0)).float()
    logits[5:20, 6:] = -torch.inf  # padding
    return logits, torch.randint(6, (43, 2), generator=seeded(1)).sort(dim=1).values


def tokens():
    logits = torch.randn(43, 7, 11, generator=seeded(0)).bfloat16()
    logits[2] *= 200  # sure, and mostly wrong: a softmax is 0 here
    targets = torch.randint(11, (43, 7), generator=seeded(1))
    targets[torch.rand(43, 7, generator=seeded(2)) < 0.4] = -100
    targets[10:20] = -100  # among them a batch without any token
    return logits, targets


def scores():
    """Similarities with many ties, most below 0, higher for most of the right ones; one row is NaN."""
    similarities, targets = torch.randint(-6, 3, (43, 20), generator=seeded(0)) / 4, torch.arange(43) % 20
    similarities[torch.arange(43), targets] += torch.randint(6, (43,), generator=seeded(1)) / 4
    similarities[7] = torch.nan
    return similarities, targets


# --------------------------------------------------------------------------------------------------------- references


def several(target):
    return [target] if isinstance(target, str) else target


def mean(rows):
    """The mean of each column of rows of dicts."""
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def measure_classes(logits, targets):
    if logits.shape[1] > 1:
        predicted, probabilities, average = logits.argmax(1), logits.softmax(1), "macro"
    else:
        targets, probabilities = targets.flatten(), logits.flatten().sigmoid()
        predicted, average = probabilities > 0.6, "binary"
    parts = sk.precision_recall_fscore_support(targets, predicted, average=average)
    return {
        "accuracy": sk.accuracy_score(targets, predicted),
        **dict(zip(("precision", "recall", "f1"), parts)),
        "roc_auc": sk.roc_auc_score(targets, probabilities, multi_class="ovr", average="weighted"),
        "pr_auc": sk.average_precision_score(targets, probabilities, average="weighted"),
        "confusion_matrix": sk.confusion_matrix(targets, predicted),
    }


def measure_numbers(outputs, targets):
    pair = targets.double(), outputs.double()
    return {"mse": sk.mean_squared_error(*pair), "mae": sk.mean_absolute_error(*pair), "r2": sk.r2_score(*pair)}


def measure_spans(logits, targets):
    rows = []
    for (first_logits, last_logits), (first, last) in zip(logits.transpose(1, 2).tolist(), targets.tolist()):
        pairs = [(i, j) for i in range(9) for j in range(i, 9)]
        found = max(pairs, key=lambda pair: first_logits[pair[0]] + last_logits[pair[1]])
        output, target = set(range(found[0], found[1] + 1)), set(range(first, last + 1))
        f1 = 2 * len(output & target) / (len(output) + len(target))
        rows.append({"span_accuracy": output == target, "span_f1": f1})
    return mean(rows)


def measure_summaries(outputs, targets):
    scorer = RougeScorer(evaluation.ROUGE)
    found = [scorer.score_multi(several(target), output) for output, target in zip(outputs, targets)]
    return mean([{name: score.fmeasure for name, score in row.items()} for row in found])


def measure_translations(outputs, targets):
    references = [[(*several(target), None)[n] for target in targets] for n in range(2)]
    sentences = [sacrebleu.sentence_bleu(*pair).score / 100 for pair in zip(outputs, map(several, targets))]
    return {"bleu": sacrebleu.corpus_bleu(outputs, references).score / 100, "sentence_bleu": np.mean(sentences)}


def measure_tokens(logits, targets):
    log_probabilities = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    losses = [-log_probabilities[i, j, targets[i, j]] for i in range(43) for j in range(7) if targets[i, j] >= 0]
    loss = np.mean(losses)
    return {"cross_entropy_loss": loss, "perplexity": math.exp(loss)}


def measure_ranks(similarities, targets):
    ranks = [
        1 + sum(not score < row[right] for i, score in enumerate(row) if i != right)
        for row, right in zip(similarities.tolist(), targets.tolist())
    ]
    recalls = {f"recall@{k}": np.mean([rank <= k for rank in ranks]) for k in (1, 3, 10)}
    return recalls | {"mrr": np.mean([1 / rank for rank in ranks])}


PACKAGES = {
    "classification": (lambda: evaluation.classification(4), classes, measure_classes),
    "binary": (lambda: evaluation.binary(0.6), yes_or_no, measure_classes),
    "regression": (evaluation.regression, numbers, measure_numbers),
    "spans": (evaluation.question_answering_spans, spans, measure_spans),
    "summarisation": (evaluation.summarisation, texts, measure_summaries),
    "translation": (evaluation.translation, texts, measure_translations),
    "language modelling": (evaluation.language_modelling, tokens, measure_tokens),
    "retrieval": (evaluation.retrieval, scores, measure_ranks),
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


def in_a_process(rank, port, results):
    """One of two: the first gets every third batch, so both have some, of different number and size."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo")
    found = {}
    for name, (package, data, _) in PACKAGES.items():
        mine = [part for n, part in enumerate(batches(data())) if (n % 3 == 0) == (rank == 0)]
        found[name] = values(package(), *mine)
    loop = TrainLoop(nn.PReLU(init=1), metrics=evaluation.classification(4), criterion=F.cross_entropy)
    found["loop"] = loop.evaluate(DataLoader(TensorDataset(*classes()), batch_size=8))  # the model gives its inputs
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives_and_the_loop_counts_every_sample_once(tmp_path):
    given = str(free_port()), tmp_path
    torch.multiprocessing.start_processes(in_a_process, given, nprocs=2, start_method="fork")
    expected = {name: reference(*data()) for name, (_, data, reference) in PACKAGES.items()}
    expected["loop"] = expected["classification"] | {"loss": F.cross_entropy(*classes()).item()}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in expected:
            same(found[name], expected[name])


def test_question_answering_is_squads():
    for output, target, exact, f1 in (
        ("The Eiffel-Tower!", "an eiffeltower", 1, 1),  # case, punctuation and articles do not count
        ("in 1889", ["1889", "the year 1889"], 0, 2 / 3),  # the best of them
        ("a cat sat on mat", "on the mat, a dog sat", 0, 2 * 3 / (4 + 4)),
        ("", [], 1, 1),
        ("the", "", 1, 1),
        ("cat", [], 0, 0),
    ):
        same(values(evaluation.question_answering(), ([output], [target])), {"exact_match": exact, "f1": f1})
    with pytest.raises(ValueError):
        evaluation.question_answering().update(["one", "two"], ["one"])


def test_packages_in_one_collection_keep_their_values():
    """A MetricCollection merges metrics whose states look the same, as those of these two do after the first batch."""
    right, packages = torch.eye(3), {"first": evaluation.retrieval((1,)), "five": evaluation.retrieval((5,))}
    found = values(MetricCollection(packages), (right,), (-right,))
    same(found, {"first_recall@1": 0.5, "first_mrr": 2 / 3, "five_recall@5": 1, "five_mrr": 2 / 3})
