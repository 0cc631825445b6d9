"""What notebook 08's callbacks do, as their user sees it: fewer batches, files, warnings, mails. All on the CPU."""

import inspect
import json
import math
import re
import socket
import ssl
import threading
import urllib.request
import warnings
from contextlib import contextmanager, nullcontext
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest.mock import Mock, call
from urllib.parse import quote

import boto3
import nbformat
import numpy as np
import pytest
import torch
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from torch import nn

from executed import BY_NUMBER, execute, try_to_run
from helpers import callbacks, experiment, storage, training
from helpers.callbacks import ClipGradients, LearningRate
from helpers.chapters import evaluation, recipes, zips
from helpers.chapters.recipes import ConstantPrediction, DryRun, GradientStatistics, KeepBest, Notify, StartFrom
from helpers.chapters.recipes import TensorBoard, TerminateOnNaN, Track
from helpers.training import Callback
from loops import LAST, Call, at, cancel, fail, make_loop, same, script
from servers import free_port, moto
from servers.embedded import connected
from test_callbacks import logged, picture, rows_of

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH")  # of aiosmtpd


def raises(end):
    return pytest.raises(ZeroDivisionError) if end is fail else nullcontext()


def test_a_dry_run_takes_few_batches_and_leaves_the_loaders_as_they_were():
    for end in None, fail:
        seen, bars, loop = [], [], make_loop()
        loop.model.register_forward_hook(lambda model, *_: seen.append("train" if model.training else "val"))
        loaders = loop.train_loader, loop.val_loader
        watch = Call(after_step=lambda loop: bars.append((loop.bar.total, loop.bar.n)))
        with raises(end):
            loop.fit(2, [LearningRate("linear"), watch, DryRun(2), *[Call(after_epoch=end, order=LAST)] * bool(end)])
        epochs = 1 if end else 2
        assert seen == ["train", "train", "val", "val"] * epochs and bars == [(4, n + 1) for n in range(2 * epochs)]
        assert (loop.train_loader, loop.val_loader) == loaders
        assert loop.history[-1]["learning_rate"] == pytest.approx(0.05 if end else 0.025)  # a schedule of 4 steps
    loop = make_loop(val=None)
    loop.fit(num_steps=1000, callbacks=[DryRun(3)])
    assert loop.steps == 3 and len(loop.history) == 1 and len(loop.train_loader) == 5


def test_statistics_of_gradients_are_those_before_clipping_and_are_written_however_training_ends(tmp_path):
    kept, run = [], experiment.Run(tmp_path)

    def keep(loop):
        for name, weight in loop.model.named_parameters():
            if weight.grad is not None and loop.steps % 3 == 0:
                kept.append((loop.epoch, loop.steps, name, weight.grad.numpy().copy()))

    given = ClipGradients(value=1e-4), GradientStatistics(run, every=3), Call(after_backward=keep, order=-99)
    with raises(fail):
        make_loop().fit(3, [*given, Call(after_step=at(11, fail))])
    rows = rows_of(run, "gradients")
    assert len(rows) == len(kept) == 4 * 6  # steps 0, 3, 6, 9; the two weights of `spare` have no gradient
    for row, (epoch, step, name, grad) in zip(rows, kept):
        assert (row["epoch"], row["step"], row["weight"]) == (str(epoch), str(step), name)
        values = {"norm": np.linalg.norm(grad), "mean": grad.mean(), "std": grad.std(), "max": abs(grad).max()}
        values |= {f"quantile_{q}": np.quantile(abs(grad), q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
        assert {name: float(row[name]) for name in values} == pytest.approx(values, rel=1e-4, abs=1e-7)
    width, height = picture(run, "gradients")
    assert width > 500 and height > 100


def test_statistics_of_gradients_come_with_accumulation_too_and_from_a_weight_of_the_criterion(tmp_path):
    scale = nn.Parameter(torch.ones(3))
    cross_entropy = lambda outputs, targets: nn.functional.cross_entropy(scale * outputs, targets)
    loop = make_loop(accumulate=2, criterion=cross_entropy)
    statistics = GradientStatistics(experiment.Run(tmp_path), every=10)
    loop.optimizers[0].add_param_group({"params": [scale]})
    loop.fit(4, [statistics])
    rows = [(row["step"], row["weight"]) for row in statistics.rows]
    assert rows[::7] == [(1, "body.weight"), (11, "body.weight")] and {name for _, name in rows[6::7]} == {"another"}


def test_a_loss_that_is_no_number_ends_training_within_the_epoch(monkeypatch):
    monkeypatch.setattr(training, "REFRESH", -1)
    for value in math.nan, math.inf:
        factor = [1.0]
        loop = make_loop(criterion=lambda outputs, targets: factor[-1] * nn.functional.cross_entropy(outputs, targets))
        with pytest.warns(UserWarning, match=f"at step 7 its loss is {value}"):
            loop.fit(3, [TerminateOnNaN(), Call(after_step=at(6, lambda loop: factor.append(value)))])
        assert loop.steps == 7 and len(loop.history) == 1


def test_a_model_that_predicts_one_class_only_is_warned_of():
    for outputs, expected in (
        ([[3.0, 1, 1], [2, 1, 0]], 1),
        ([[3.0, 1, 1], [1, 3, 1]], 2),
        ([[-2.0], [3]], 2),
        ([2.0, 3], 1),
    ):
        loop = make_loop((0.1, 0.2))
        loop.model.get_predictions = lambda batch: (torch.tensor(outputs), torch.zeros(len(outputs)))
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                history = loop.fit(1, [ConstantPrediction()])
            assert history[-1]["val_predicted_classes"] == expected
            warning = f"Epoch {loop.epoch}: the model predicts the same class for every validation sample."
            assert [str(each.message) for each in caught] == [warning] * (expected == 1)


def test_tensorboard_reads_the_history_from_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REFRESH", -1)
    copied, losses, loop = [], [], make_loop()
    watching = Call(
        after_epoch=lambda loop: copied.append(storage.list_files(tmp_path)),
        after_step=lambda loop: losses.append(loop.mean_loss),
        order=LAST,
    )
    loop.fit(3, [TensorBoard(f"{tmp_path}/"), LearningRate("linear"), watching])
    [name] = storage.list_files(tmp_path)
    assert copied == [[name]] * 3
    found = logged(tmp_path)
    assert [value for _, value in found.pop("running/loss")] == pytest.approx(losses)
    assert found == {
        tag: [(row["epoch"], pytest.approx(row[tag.replace("/", "_")])) for row in loop.history]
        for tag in ("train/loss", "val/loss", "learning_rate", "train/samples_per_second")
    }


PASSWORD = "p@ss/word:1"
USER = f"ann%40x.org:{quote(PASSWORD, safe='')}@"


@contextmanager
def mail_server(**options):
    """An SMTP server on loopback; yields its port, the mails (from, to, subject, text), and the passwords it was told."""
    mails, passwords = [], []

    class Mailbox:
        async def handle_DATA(self, server, session, envelope):
            mail = message_from_bytes(envelope.original_content)
            text = mail.get_payload(decode=True).decode().strip()
            mails.append((envelope.mail_from, *envelope.rcpt_tos, mail["Subject"], text))
            return "250 OK"

    def check(server, session, envelope, mechanism, data):
        passwords.append(data.password.decode())
        return AuthResult(success=(data.login, passwords[-1]) == (b"ann@x.org", PASSWORD), handled=False)

    server = Controller(Mailbox(), "127.0.0.1", free_port(), authenticator=check, auth_require_tls=False, **options)
    server.start()
    try:
        yield server.port, mails, passwords
    finally:
        server.stop()


def test_a_mail_tells_how_training_ended_and_no_password_is_sent_to_a_server_nobody_vouches_for(tmp_path, monkeypatch):
    authority, certified = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(certified)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    for scheme, user, options in (
        ("smtp", "", {}),
        ("smtp", USER, {"tls_context": certified, "require_starttls": True}),
        ("smtps", USER, {"ssl_context": certified}),
    ):
        with mail_server(**options) as (port, mails, passwords), monkeypatch.context() as environment:
            environment.setenv("SMTP_URL", f"{scheme}://{user}127.0.0.1:{port}")
            if user:
                with pytest.warns(UserWarning, match="CERTIFICATE_VERIFY_FAILED"):
                    make_loop().fit(1, [Notify("ann@x.org")])
                assert not passwords and not mails
            environment.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
            history = make_loop().fit(2, [Notify("ann@x.org", "Run: leaves", sender="lab@x.org")])
            with pytest.raises(ZeroDivisionError):
                make_loop().fit(1, [Notify("ann@x.org"), Call(after_step=at(3, fail))])
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items())
        ended, failed = "Run: leaves ended after 10 steps", "Training failed after 3 steps"
        assert mails == [
            ("lab@x.org", "ann@x.org", ended, f"{ended}: {numbers}"),
            ("ann@x.org", "ann@x.org", failed, f"{failed}: ZeroDivisionError: on purpose"),
        ]
        assert passwords == [PASSWORD] * 2 * bool(user)


def test_no_password_is_sent_without_tls_except_on_this_machine(monkeypatch):
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: known("127.0.0.1", *rest, **options))
    with mail_server() as (port, mails, passwords):
        monkeypatch.setenv("SMTP_URL", f"smtp://{USER}mail.test:{port}")
        with pytest.warns(UserWarning, match="was not sent: SMTPNotSupportedError: STARTTLS extension not supported"):
            make_loop().fit(1, [Notify("ann@x.org")])
        assert not passwords and not mails
        for url in f"smtp://mail.test:{port}", f"smtp://{USER}127.0.0.1:{port}":  # no password, this machine
            monkeypatch.setenv("SMTP_URL", url)
            make_loop().fit(1, [Notify("ann@x.org")])
        assert len(passwords) == 1 and len(mails) == 2


def test_a_mail_goes_through_amazon_ses_without_an_smtp_url(tmp_path, monkeypatch):
    monkeypatch.delenv("SMTP_URL", raising=False)
    with moto.moto(tmp_path) as environment, connected(environment):  # its own: it lists all that it holds as JSON
        with pytest.warns(UserWarning, match="was not sent: MessageRejected: .*not verified"):
            assert len(make_loop().fit(1, [Notify("bob@x.org")])) == 1
        boto3.client("ses").verify_email_identity(EmailAddress="bob@x.org")
        make_loop().fit(1, [Notify("ann@x.org", "Leaves", sender="bob@x.org")])
        with urllib.request.urlopen(environment["AWS_ENDPOINT_URL"] + "/moto-api/data.json") as answer:
            [mail] = json.load(answer)["ses"]["Message"]
    assert (mail["source"], mail["destinations"]["ToAddresses"]) == ("bob@x.org", ["ann@x.org"])
    assert mail["subject"] == "Leaves ended after 5 steps" and mail["body"].startswith(mail["subject"] + ": epoch 1, ")


@contextmanager
def web_server(answer=b"HTTP/1.0 200 OK\r\n\r\nok"):
    """A web server that answers so; yields the address of a webhook and the list of what was posted."""
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, self.headers["Content-Type"], json.loads(body)["text"]))
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/hook/hidden", posted
        finally:
            server.shutdown()


def test_a_webhook_tells_how_training_ended_and_no_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "correct-horse-battery")

    def leak(loop):
        raise ValueError("cannot log in with correct-horse-battery")

    with web_server() as (url, posted):
        make_loop().fit(1, [Notify(url)])
        with pytest.raises(ValueError):
            make_loop().fit(1, [Notify(url, "Leaves"), Call(before_fit=leak)])
    assert [values[:2] for values in posted] == [("/hook/hidden", "application/json")] * 2
    assert posted[0][2].startswith("Training ended after 5 steps: epoch 1, train_loss ")
    assert posted[1][2] == "Leaves failed after 0 steps: ValueError: cannot log in with ***"


def test_a_notice_that_cannot_be_sent_is_a_warning_that_tells_no_secret(monkeypatch):
    with mail_server() as (port, mails, _), web_server(b"HTTP/1.0 404 Not Found\r\n\r\n") as (hook, _):
        for to, smtp_url, reason in (
            ("http://127.0.0.1:hidden/hook", "", "InvalidURL"),
            (hook, "", "HTTPError: HTTP Error 404: Not Found"),
            ("ann@x.org", f"smtp://ann:hidden@127.0.0.1:{free_port()}", "Connection refused"),
            ("ann@x.org", "smtp://ann:hidden/1@127.0.0.1:1", "ValueError"),
            ("ann@x.org", f"smtp://ann:hidden@127.0.0.1:{port}", "SMTPAuthenticationError"),
        ):
            monkeypatch.setenv("SMTP_URL", smtp_url)
            notify, loop = Notify(to), make_loop()
            with pytest.warns(UserWarning, match=f"The notice about the training was not sent: .*{reason}") as caught:
                assert loop.fit(2, [notify]) is loop.history and len(loop.history) == 2
                with pytest.raises(ZeroDivisionError):
                    loop.fit(1, [notify, Call(after_epoch=fail)])
            assert len(caught) == 2 and not mails and not any("hidden" in str(each.message) for each in caught)


def test_a_tracker_gets_the_numbers_of_each_epoch_and_is_closed_however_training_ends():
    for end in None, fail, cancel:
        tracker, loop = Mock(), make_loop()
        ending = [Call(after_step=at(8, end))] * bool(end)
        with raises(end):
            loop.fit(2, [Track(tracker, project="leaves"), script("val_matrix", [[[1, 2]]] * 2), *ending])
        rows = [{name: value for name, value in row.items() if name != "val_matrix"} for row in loop.history]
        logs = [call.log(row, step=row["epoch"]) for row in rows]
        assert tracker.mock_calls == [call.init(project="leaves"), *logs, call.finish()] and len(logs) == 2 - bool(end)


def test_the_states_after_the_best_epochs_are_kept_and_training_goes_on_from_a_chosen_one(tmp_path):
    for monitor, values, best in (
        ("val_loss", [5, 3, math.nan, 2, 4], [2, 4]),
        ("val_accuracy", [0.5, 0.9, 0.1, 0.2, 0.8], [2, 5]),
    ):
        loop, again, url = make_loop(kind=torch.optim.AdamW), make_loop(kind=torch.optim.AdamW), tmp_path / monitor
        given = lambda last: [script(monitor, values), LearningRate("cosine"), last]
        loop.fit(5, given(KeepBest(url, monitor, keep=2)))
        assert storage.list_files(url) == [f"epoch_{epoch:05d}.safetensors" for epoch in best]
        again.fit(5, given(StartFrom(f"{url}/epoch_00002.safetensors")))
        assert same(loop.model, again.model) and [row["epoch"] for row in again.history] == [1, 2, 3, 4, 5]


def test_runs_are_drawn_over_a_hyperparameter_with_the_best_as_a_star_and_their_reports_run_no_script(tmp_path):
    for rate, accuracy in ((0.001, 0.7), (0.01, 0.9), (1.0, 0.2)):
        run = experiment.Run(tmp_path, learning_rate=rate, note='"><script>alert(1)</script>')
        run.finish({"val_accuracy": accuracy})
    comparison = experiment.compare(tmp_path)
    [axis] = recipes.plot_runs(comparison, "learning_rate").axes
    dots, star = (points.get_offsets().tolist() for points in axis.collections)
    assert sorted(dots) == [[0.001, 0.7], [0.01, 0.9], [1.0, 0.2]] and star == [[0.01, 0.9]]
    assert axis.get_xscale() == "log" and (axis.get_xlabel(), axis.get_ylabel()) == ("learning_rate", "val_accuracy")
    with pytest.raises(ValueError, match="No run .* 'width' .*there are: learning_rate, val_accuracy"):
        recipes.plot_runs(comparison, "width")
    page = recipes.show_report(run.url).data
    assert "<iframe sandbox srcdoc=" in page and "<script" not in page and page.count('"') == 4
    assert "val_accuracy" in page


def test_08_shows_that_loops_agree_and_that_a_killed_training_resumes_exactly(embedded, tmp_path, bucket, every):
    storage.create_bucket(bucket)
    [outcome] = try_to_run("08b", dict(bucket=bucket), tmp_path / "alone")
    assert outcome.status == "FAILED" and "make run NOTEBOOKS=01" in outcome.error
    zips.unzip(every(8), f"s3://{bucket}/leaves")
    zips.split_classes(f"s3://{bucket}/leaves")
    results = execute("08", tmp_path, bucket=bucket, epochs=1)
    assert results["resumed_bit_identical"] and (results["runs"], results["packages"]) == (6, 9)
    assert results["loop_overhead"] < 3 and 0 < results["best_val_accuracy"] <= 1
    assert storage.read(f"{results['best_run']}/manifest.json")


def test_every_callback_and_every_metric_package_is_shown_in_08():
    cells = [cell for page in ("08a", "08b", "08c") for cell in nbformat.read(BY_NUMBER[page], as_version=4).cells]
    shown = "\n".join(cell.source for cell in cells if cell.cell_type == "code" and "#| export" not in cell.source)
    own = (callbacks.__name__, recipes.__name__)
    shipped = [each.__name__ for each in Callback.__subclasses__() if each.__module__ in own]
    functions = inspect.getmembers(evaluation, inspect.isfunction)
    packages = [name for name, each in functions if each.__module__ == evaluation.__name__ and name[0] != "_"]
    assert len(shipped) >= 14 and len(packages) >= 9
    assert not [name for name in shipped + packages if not re.search(rf"\b{name}\(", shown)]
