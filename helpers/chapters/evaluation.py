"""Result packages: named bundles of metrics for a task, over torchmetrics.

A package is a torchmetrics metric: `TrainLoop(model, metrics=classification(10))` takes it; by hand it is
`update(outputs, targets)` for every batch, then `compute()`, {name: value}. Values are fractions (1.0 is 100 %) unless
their line says otherwise; many batches, of any size, in several processes, give what one batch in one process gives.
A package of your own is a few lines, and another form of input is a LambdaInputTransformer around a package:

    def grading():
        return MetricCollection({"kappa": MulticlassCohenKappa(5, weights="quadratic"), "mae": MeanAbsoluteError()})
"""

import math
from functools import partial

import torch
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics import classification as tm
from torchmetrics.functional import r2_score
from torchmetrics.functional.text import rouge_score, squad
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
from torchmetrics.text import SacreBLEUScore
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.wrappers import LambdaInputTransformer


def classification(num_classes):
    """accuracy; precision, recall, f1 (macro: the mean over classes); roc_auc, pr_auc; confusion_matrix (counts).

    outputs: logits (samples, classes); targets: class indices (samples,). roc_auc and pr_auc (average precision, the
    area under the precision-recall curve) are of each class against the rest, averaged by how often the class occurs,
    so one that never does has no say; they are exact, and keep all outputs. confusion_matrix: rows true, columns
    predicted. Definitions: https://scikit-learn.org/stable/modules/model_evaluation.html
    """
    return LambdaInputTransformer(MetricCollection({
        "accuracy": tm.MulticlassAccuracy(num_classes, average="micro"),
        "precision": tm.MulticlassPrecision(num_classes),
        "recall": tm.MulticlassRecall(num_classes),
        "f1": tm.MulticlassF1Score(num_classes),
        "roc_auc": tm.MulticlassAUROC(num_classes, average="weighted"),
        "pr_auc": tm.MulticlassAveragePrecision(num_classes, average="weighted"),
        "confusion_matrix": tm.MulticlassConfusionMatrix(num_classes),
    }), partial(torch.softmax, dim=1))  # here, since torchmetrics would guess for each batch whether it holds logits


def binary(threshold=0.5):
    """The same for yes or no, precision, recall and f1 being those of yes; confusion_matrix: [[tn, fp], [fn, tp]].

    outputs: one logit per sample, (samples,) or (samples, 1); targets: 0 or 1, alike, of any dtype. Yes is a
    probability above the threshold.
    """
    return LambdaInputTransformer(MetricCollection({
        "accuracy": tm.BinaryAccuracy(threshold),
        "precision": tm.BinaryPrecision(threshold),
        "recall": tm.BinaryRecall(threshold),
        "f1": tm.BinaryF1Score(threshold),
        "roc_auc": tm.BinaryAUROC(),
        "pr_auc": tm.BinaryAveragePrecision(),
        "confusion_matrix": tm.BinaryConfusionMatrix(threshold),
    }), lambda outputs: outputs.flatten().sigmoid(), lambda targets: targets.flatten().long())


def regression():
    """mse and mae (in the targets' unit, squared for mse), r2 (1 is perfect, 0 what the targets' mean would get).

    outputs, targets: (samples,) or (samples, values), r2 then being the mean over the values.
    """
    return MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": _R2()})


class _R2(Metric):  # torchmetrics' R2Score sums squares: above 1 for targets of 1000 ± 1, so the mean goes first here
    def __init__(self):
        super().__init__()
        for name in ("outputs", "targets"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, outputs, targets):
        self.outputs.append(outputs)
        self.targets.append(targets)

    def compute(self):
        outputs, targets = dim_zero_cat(self.outputs), dim_zero_cat(self.targets)
        return r2_score(outputs - targets.mean(0), targets - targets.mean(0))


class Mean(Metric):
    """The mean over all samples of each of `names`: score(outputs, targets) is a tensor (samples, names)."""

    def __init__(self, names, score):
        super().__init__()
        self.names, self.score = names, score
        for name in (*names, "count"):  # not one for all: a MetricCollection merges metrics whose states look the same
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, outputs, targets=None):
        values = self.score(outputs, targets).to(self.device)
        self.count += len(values)
        for name, total in zip(self.names, values.sum(0)):
            setattr(self, name, getattr(self, name) + total)

    def compute(self):
        return {name: getattr(self, name) / self.count for name in self.names}


def question_answering():
    """exact_match and f1 (of the words) of answers, in SQuAD's normalisation: no case, punctuation, articles.

    outputs: texts; targets: for each a text, or a list of texts of which the best counts ("" or none: no answer).
    Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250
    """
    return Mean(("exact_match", "f1"), partial(_of_texts, _squad))


def question_answering_spans():
    """span_accuracy (both ends right) and span_f1 (of the tokens in common) of answers that are a part of a text.

    outputs: logits (samples, tokens, 2) of being the first and the last token, -inf on padding; targets: the indices of
    these two (samples, 2). The answer is the likeliest pair of which the first is not after the last. Devlin et al.
    2018, section 4.2, https://arxiv.org/abs/1810.04805
    """
    return Mean(("span_accuracy", "span_f1"), _spans)


def summarisation():
    """rouge1, rouge2 (words and pairs of words in common) and rougeL (longest common subsequence): F1, no stemming.

    outputs: texts; targets: for each a text, or a list of texts of which the best counts. Lin 2004,
    https://aclanthology.org/W04-1013
    """
    return Mean(_ROUGE, partial(_of_texts, _rouge))


def translation():
    """bleu (of the whole corpus) and sentence_bleu (the mean over sentences), 0 to 1 where papers often say 0 to 100.

    outputs: texts; targets: for each a text or a list of texts. Tokens are sacrebleu's 13a; sentences are smoothed as
    there (exponentially, over the n-grams that fit in), the corpus is not: bleu is 0 while no four words match.
    Papineni et al. 2002, https://aclanthology.org/P02-1040; Post 2018, https://aclanthology.org/W18-6319
    """
    return MetricCollection({"bleu": LambdaInputTransformer(SacreBLEUScore(), transform_target=_references),
                             "sentence_bleu": Mean(("sentence_bleu",), partial(_of_texts, _sentence_bleu))})


def language_modelling():
    """cross_entropy_loss (nats per token, the mean over all tokens of all batches) and perplexity, its exponential.

    outputs: logits (samples, tokens, vocabulary), those at i predicting targets[:, i]; targets: token ids
    (samples, tokens), -100 where not counted. Jelinek et al. 1977, https://doi.org/10.1121/1.2016299
    """
    return _LanguageModelling(("cross_entropy_loss",), _token_losses)


def retrieval(ks=(1, 3, 10)):
    """recall@k (the right one is among the k best) and mrr, the mean of 1 / its rank; one candidate is right.

    outputs: scores (queries, candidates), any real numbers, higher is better; targets: the index of the right one
    (queries,), or nothing for a similarity matrix, whose diagonal is right. Candidates with the same score rank before
    the right one: a model that says the same of all gets no credit. Voorhees 1999, https://trec.nist.gov/pubs/trec8
    """
    return Mean((*(f"recall@{k}" for k in ks), "mrr"), partial(_ranked, ks))


def _references(targets):
    return [[target] if isinstance(target, str) else list(target) for target in targets]


def _of_texts(score, outputs, targets):
    return torch.tensor([score(*pair) for pair in zip(outputs, _references(targets), strict=True)])


def _squad(output, references):
    values = squad({"id": "", "prediction_text": output}, {"id": "", "answers": {"text": references or [""]}})
    return [values[name].item() / 100 for name in ("exact_match", "f1")]


def _spans(outputs, targets):
    pairs = outputs[:, :, None, 0] + outputs[:, None, :, 1]  # (samples, first, last)
    backwards = torch.ones_like(pairs[0], dtype=torch.bool).tril(-1)
    best = pairs.masked_fill(backwards, -torch.inf).flatten(1).argmax(1)
    first, last = best // outputs.shape[1], best % outputs.shape[1]
    common = (torch.minimum(last, targets[:, 1]) - torch.maximum(first, targets[:, 0]) + 1).clamp(min=0)
    lengths = (last - first + 1) + (targets[:, 1] - targets[:, 0] + 1)
    return torch.stack([(first == targets[:, 0]) & (last == targets[:, 1]), 2 * common / lengths], dim=1)


_ROUGE = ("rouge1", "rouge2", "rougeL")  # rougeLsum, or stemming, would take nltk and a download


def _rouge(output, references):
    values = rouge_score([output], [references], rouge_keys=_ROUGE)
    return [values[f"{name}_fmeasure"].item() for name in _ROUGE]


def _sentence_bleu(output, references):
    counts = SacreBLEUScore()  # for its counts: its value is 0 for each sentence of which no four words match
    counts.update([output], [references])
    if not counts.numerator.any():
        return [0.0]
    logs, smooth = [], 1
    for matches, total in zip(counts.numerator.tolist(), counts.denominator.tolist()):
        if total:
            smooth *= 1 if matches else 2
            logs.append(math.log((matches or 1 / smooth) / total))
    brevity = min(0.0, 1 - (counts.target_len / counts.preds_len).item())
    return [math.exp(brevity + sum(logs) / len(logs))]


class _LanguageModelling(Mean):
    def compute(self):
        values = super().compute()
        return values | {"perplexity": values["cross_entropy_loss"].exp()}


def _token_losses(outputs, targets):  # torchmetrics' Perplexity takes the log of a softmax: infinite for a sure mistake
    losses = F.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return losses[targets.flatten() != -100, None]


def _ranked(ks, outputs, targets):  # torchmetrics' retrieval metrics count no score below 0 and go query by query
    targets = torch.arange(len(outputs), device=outputs.device) if targets is None else targets
    rank = (~(outputs < outputs.gather(1, targets[:, None]))).sum(1)  # not <: the last when the score is NaN
    return torch.stack([*(rank <= k for k in ks), 1 / rank], dim=1)


class PredictedClasses(Metric):
    """How many classes the predictions are of: 1 where a classifier says the same of everything."""

    def __init__(self):
        super().__init__()
        self.add_state("classes", [], dist_reduce_fx="cat")

    def update(self, outputs, targets):  # logits (samples, classes, …), or one for yes or no
        binary = outputs.ndim == 1 or outputs.shape[1] == 1
        self.classes.append(((outputs > 0).long() if binary else outputs.argmax(1)).unique())

    def compute(self):
        return torch.tensor(dim_zero_cat(self.classes).unique().numel())
