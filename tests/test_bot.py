"""The joke bot: votes in SQLite and PostgreSQL, one worker for many people, Telegram as the real library speaks it."""

import asyncio
import contextlib
import csv
import gc
import os
import re
import runpy
import sys
import threading
import time
import weakref
from collections import Counter
from urllib.parse import quote

import pytest
from cells import run_cells
from servers import bot as processes
from servers import postgres as pg
from servers import telegram as tg
from servers.bot import PAIRS

from helpers import experiment, storage
from helpers.chapters import bot, joke_corpus, telegram_bot
from helpers.chapters import jokes as language


@pytest.fixture(scope="module")
def postgres():
    if pg.missing():
        pytest.skip(f"PostgreSQL is not installed here, missing: {', '.join(pg.missing())}")
    with pg.postgres() as port:
        yield port


@pytest.fixture
def sqlite(tmp_path):
    """The URL of a new database, connected."""
    url = f"sqlite:///{tmp_path}/jokes.db"
    bot.connect(url)
    return url


joke_bot = lambda *args, **options: contextlib.closing(bot.JokeBot(*args, **options))


def echo(questions):
    return [(question or "Any joke?", f"{question} it is") for question in questions]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_second_vote_of_the_same_person_replaces_the_first_and_any_text_can_be_told(kind, sqlite, request):
    url = sqlite
    if kind == "postgresql":
        port = request.getfixturevalue("postgres")
        url = f"postgresql://bot:{quote(pg.PASSWORD, safe='')}@127.0.0.1:{port}/postgres"
        bot.connect(url)
    one, two = bot.record("human", "Why?", "Because."), bot.record("model", "How?", "So.", asked=True)
    assert bot.tally() == {"human": (1, 0, 0), "model": (1, 0, 0)} and bot.vote(10**17, 1, True) is None
    for joke, person, liked in (one, 1, True), (one, 2, True), (two, 1, False), (one, 1, False), (one, 1, False):
        assert bot.vote(joke.id, person, liked).answer == joke.answer
    if kind == "postgresql":  # a restarted server breaks nothing
        pg.query(port, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    assert bot.tally(asked=False) == {"human": (1, 2, 1)} and bot.tally(asked=True) == {"model": (1, 1, 0)}
    bot.connect(url)  # as after a restart
    assert bot.tally() == {"human": (1, 2, 1), "model": (1, 1, 0)}
    joke = bot.record("it's; DROP TABLE vote --", "a\0b \ud800 😀 'quoted' \"doubly\" %s", "x" * 5000)
    told = bot.vote(joke.id, "me", True)
    assert told.question == "ab  😀 'quoted' \"doubly\" %s" and 1000 < len(told.answer) < 4000
    assert bot.tally()["it's; DROP TABLE vote --"] == (1, 1, 1)
    with bot.connection():
        bot.Table._meta.database.execute_sql("ALTER TABLE joke DROP COLUMN asked")  # as in the version before
    bot.connect(url)
    assert bot.tally(asked=False) == {} and bot.tally()["human"] == (1, 2, 1)


def test_jokes_that_people_like_are_the_next_data_set(sqlite, tmp_path):
    joke, private = PAIRS[0], ("My secret?", "No.")
    other = 'Is it, "true", that\nwe quote?', "Yes, \"so\", and 'so'."
    for number in range(6):
        first, second = (bot.record(source, *joke) for source in ("model", "people"))
        bot.vote(first.id, f"fan {number}", False)
        bot.vote(second.id, f"fan {number}", True)  # the same joke, of which they think better now
        bot.vote(bot.record("model", *other).id, f"fan {number}", number > 0)
        for asked in True, None:  # None: nobody knows, in a database of the version before
            bot.vote(bot.record("model", *private, asked=asked).id, f"fan {number}", True)
    page = run_cells("07a", "def wilson", "def read_votes", "def liked_jokes", "def save_votes")
    liked_jokes, rows = page["liked_jokes"], page["read_votes"]()
    assert len(rows) == 30 and {row["person"] for row in rows} == set(range(1, 7)) and "fan" not in str(rows)
    assert liked_jokes(rows) == [joke] and liked_jokes(rows, votes=7) == []
    page |= dict(run=experiment.Run(tmp_path / "runs"), liked_votes=5, liked_above=0.4)  # five of six: at least 0.44
    page["save_votes"]()
    assert joke_corpus.read(f"{page['run'].url}/liked_jokes.csv") == ([joke, other], 0)  # which notebook 05 takes
    with open(f"{page['run'].url}/votes.csv", newline="") as file:
        counted = Counter((row["asked"], row["liked"]) for row in csv.DictReader(file))
    assert counted == {("False", "True"): 11, ("False", "False"): 7, ("True", "True"): 6, ("", "True"): 6}


def test_no_vote_is_lost_when_the_voters_are_killed(sqlite, tmp_path):
    jokes, log = [bot.record("model", "Why?", "Because.").id for _ in range(100)], tmp_path / "log"
    voters = processes.start(processes.vote_for_ever, log, {**os.environ, "JOKES_DATABASE_URL": sqlite}, *jokes)
    assert any(log.exists() and log.read_bytes().count(b"\n") > 120 or time.sleep(0.02) for _ in range(3000))
    voters.kill()
    voters.join()
    counted = {line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")}

    def there():
        with bot.connection():
            return {f"{vote.joke_id} {vote.person}\n": vote.liked for vote in bot.Vote.select()}

    before = there()
    assert len(counted) >= 100 and counted <= before.keys() and len(before.keys() - counted) <= 50  # not printed yet
    bot.vote(jokes[0], 0, False)  # and life goes on
    assert there() == {**before, f"{jokes[0]} 0\n": False}


def test_a_file_is_private_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "REPOSITORY", tmp_path / "C#?")
    monkeypatch.delenv("JOKES_DATABASE_URL", raising=False)
    for name, path in ("", "C#?/runs/jokes.db"), ("what#is?this=1 %20&.db", "what#is?this=1 %20&.db"):
        assert bot.connect(name and f"sqlite:///{tmp_path}/{name}") == f"sqlite: {tmp_path / path}"
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o600 and bot.tally() == {}


def test_a_bad_database_is_one_clear_error_without_the_password(request, monkeypatch):
    server = f"127.0.0.1:{9 if pg.missing() else request.getfixturevalue('postgres')}"
    encoded = quote(pg.PASSWORD, safe="")
    for url in (
        "jokes.db",
        f"postgresql://bot:{encoded}@127.0.0.1:9/jokes",  # nobody is there
        f"postgresql://bot:{pg.PASSWORD}@{server}/jokes",
        "postgresql://bot:w:rd#1@127.0.0.1/jokes",
        "postgresql://bot:1?w:rd=w:rd@127.0.0.1/jokes",
        f"postgresql://bot:{encoded}x@{server}/postgres",
        f"postgresql://bot@{server}/nowhere?password={encoded}",
        "sqlite:////proc/nowhere/jokes.db",
        "sqlite://",
    ):
        monkeypatch.setenv("JOKES_DATABASE_URL", url)
        with pytest.raises(storage.StorageError, match="database|votes cannot be kept in") as error:
            bot.connect()
        said = str(error.getrepr(style="native"))
        assert not re.search(r"p@ss|p%40ss|w:rd|w%3Ard|rd#1", said), said


def test_whole_jokes_are_ready_who_waits_is_gathered_and_too_many_are_politely_refused():
    opened, entered, batches, threads = threading.Event(), threading.Event(), [], set()

    def gate(questions):  # answers once it is open
        threads.add(threading.get_ident())
        batches.append(questions)
        entered.set()
        assert opened.wait(20)
        return echo(questions)

    opened.set()
    with joke_bot({"model": gate}, queue=40) as jokes:
        assert any(time.sleep(0.05) or len(jokes.queue.ready["model"]) == 16 for _ in range(400))
        opened.clear()
        entered.clear()
        for _ in range(16):
            jokes.ask("me").result(0)  # at once, though the source does not answer
        assert entered.wait(60)
        waiting = [jokes.ask(number, f"{number}?") for number in range(40)]
        with pytest.raises(bot.Busy, match="try again"):
            jokes.ask("late", "Late?")
        assert waiting.pop().cancel()  # who does not want it any more harms nobody
        opened.set()
        answers, kept = [future.result(60) for future in waiting], weakref.WeakSet(waiting)
        del waiting
        gc.collect()
        assert len(kept) <= 16  # those of the last batch: memory stays flat
    assert answers == [("model", *pair) for pair in echo([f"{number}?" for number in range(39)])]
    assert batches[:2] == [[None] * 16] * 2 and [len(batch) for batch in batches[2:]] == [16, 16, 7]
    assert len(threads) == 1


def test_each_person_has_a_limit_of_their_own(monkeypatch):
    now = [time.monotonic()]
    monkeypatch.setattr(bot.time, "monotonic", lambda: now[0])  # the clock, held
    with joke_bot({"model": echo}, per_minute=3, stock=0) as jokes:
        for _ in range(3):
            jokes.ask("fast", "Why?").result(60)
        with pytest.raises(bot.Busy, match="seconds"):
            jokes.ask("fast", "Why?")
        jokes.ask("another", "Why?").result(60)
        now[0] += 60
        jokes.ask("fast", "Why?").result(60)
        assert set(jokes.asked) == {"fast"}  # nobody is remembered for longer


@contextlib.contextmanager
def chatting(directory, exits=0):
    """A Telegram and the bot in a `process` of its own, which stops in good order and has not said its token."""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"TELEGRAM_BOT_TOKEN": tg.TOKEN, "JOKES_DATABASE_URL": f"sqlite:///{directory}/jokes.db"}
    with tg.telegram() as server:
        running = processes.start(processes.chat, directory / "log", env, "x.csv", "--base-url", server.url)
        server.process, server.log, server.database = running, (directory / "log").read_text, env["JOKES_DATABASE_URL"]
        try:
            server.wait(lambda: not running.is_alive() or server.called("getUpdates"), "the bot")
            assert running.is_alive(), server.log()
            yield server
            running.terminate()
            running.join(60)
            assert running.exitcode == exits, server.log()
        finally:
            running.kill()
            running.join()
            assert tg.TOKEN.split(":")[1] not in server.log()


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    with chatting(tmp_path_factory.mktemp("bot")) as server:
        yield server


def buttons(message):
    """{mark: data} of the buttons below a message."""
    [row] = message["reply_markup"]["inline_keyboard"]
    return {button["text"]: button["callback_data"] for button in row}


def votes(server):
    """(votes, likes) of all sources, read from the file while the bot runs."""
    bot.connect(server.database)
    return tuple(sum(counts) for counts in zip((0, 0), *(row[1:] for row in bot.tally().values())))


def test_a_joke_and_an_answer_as_they_are_written(chat):
    for number in range(12):
        chat.say(2, "/joke" if number % 2 else f"/joke@{tg.BOT['username']}")
    texts = {chat.reply(2, number)["text"] for number in range(12)}
    assert texts <= {*map("\n\n".join, PAIRS), f"{PAIRS[1][0]}\n\n<None> & more."} and len(texts) > 1
    chat.say(3, "Why did the <i>lighthouse</i> & " + "keeper " * 700)  # < and & come through, no tag of theirs counts
    question, answer = chat.reply(3)["text"].split("\n\n")
    assert question.startswith("Why did the <i>lighthouse</i> & keeper") and len(question) == 200
    assert answer == f"<{question}> & more." and list(buttons(chat.reply(3))) == ["👍", "👎"]


def test_a_vote_is_thanked_for_and_may_be_changed_and_counts_below_an_old_message(chat):
    chat.say(4, "/joke")
    message, (count, likes) = chat.reply(4), votes(chat)
    joke = message["text"]
    for mark, new, liked in (("👍", 1, 1), ("👎", 1, 0), ("👎", 1, 0), ("👍", 1, 1)):
        assert "Thank you" in chat.press(4, message, buttons(message)[mark])
        chat.wait(lambda: chat.sent(4)[0]["text"] == f"{joke}\n\nThank you for your feedback {mark}", "thanks")
        assert votes(chat) == (count + new, likes + liked) and list(buttons(chat.sent(4)[0])) == ["👍", "👎"]
    chat.press(5, message, buttons(message)["👎"])  # somebody else, to whom it was passed on
    chat.wait(lambda: "👎" in chat.sent(4)[0]["text"], "thanks to another")
    old = {"message_id": message["message_id"], "date": 0, "chat": message["chat"]}
    chat.answers["answerCallbackQuery"] += [tg.refusal(400, "Bad Request: query is too old")]
    chat.press(6, old, buttons(message)["👍"])
    chat.press(7, None, buttons(message)["👎"])  # of an inline message
    assert votes(chat) == (count + 4, likes + 2) and len(chat.sent(4)) == 1  # no word of an error


def test_nobody_votes_on_what_they_were_not_told(chat):
    chat.say(8, "What is my secret?")
    chat.say(9, "/joke")
    mine, before = chat.reply(9), votes(chat)
    numbers = [int(buttons(message)["👍"][1:]) for message in (chat.reply(8), mine)]
    assert min(numbers) >= 10**17 and abs(numbers[0] - numbers[1]) > 10**6, "the next number could be guessed"
    for data in (f"👍{numbers[0] + 1}", "👍1", "👍" + "9" * 30, "like", ""):
        assert "no longer" in chat.press(9, mine, data)
    assert votes(chat) == before and chat.sent(9)[0]["text"] == mine["text"]


def test_what_is_no_question_is_explained_and_what_is_no_message_or_malformed_is_left_out(chat):
    photo = [{"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}]
    for number, content in enumerate([dict(text="/nonsense"), dict(photo=photo, caption="Why?")]):
        chat.say(10, **content)
        assert chat.reply(10, number)["text"].startswith("I tell jokes. /joke for one, or write a question")
    chat.say(11, new_chat_title="what Telegram itself says in a chat")
    chat.push(edited_message={"message_id": 1, "date": 1, "edit_date": 2, **tg.person(11), "text": "Why?"})
    chat.push(channel_post={"message_id": 1, "date": 1, "chat": {"id": 11, "type": "channel"}, "text": "Why?"})
    chat.push(message="no message")
    chat.push(callback_query={"id": 1})
    chat.push(message={"message_id": 1, "date": "yesterday", **tg.person(11), "text": "Why?"})
    chat.say(11, "/start")
    assert chat.reply(11)["text"].startswith("I tell jokes")  # and nothing to what came before
    chat.wait(lambda: not chat.updates, "the updates to be confirmed")


def test_a_busy_telegram_gets_everything_in_the_end(chat):
    wait, fault = tg.refusal(429, "Too Many Requests: retry after 1", retry_after=1), tg.refusal(502, "Bad Gateway")
    chat.answers["sendMessage"] += [wait, fault, ("", 0)]
    chat.answers["getUpdates"] += [fault, ({"ok": True}, 200), wait]
    chat.say(12, "Why is the lighthouse bright?")
    assert chat.reply(12)["text"].startswith("Why is the lighthouse bright?")
    assert not chat.answers["sendMessage"] and len(chat.sent(12)) == 1


def test_an_error_is_told_politely_and_logged(chat):
    chat.answers["sendMessage"] += [tg.refusal(403, "Forbidden: bot was blocked by the user")]
    chat.say(14, "/start")
    chat.wait(lambda: not chat.answers["sendMessage"], "the attempt")
    chat.say(15, "Fail!")
    assert "Something went wrong, sorry" in chat.reply(15)["text"]
    chat.say(15, "Why?")
    assert chat.reply(15, 1)["text"] == "Why?\n\n<Why?> & more."
    for _ in range(45):  # 20 are told in a minute
        chat.say(16, "/joke")
    texts = [chat.reply(16, number)["text"] for number in range(45)]
    assert sum(text.startswith("You are faster than I am!") for text in texts) >= 5
    log = chat.log()
    assert "ValueError: this joke is not funny" in log and "/getMe" not in log and "api" not in log


def test_sigterm_finishes_what_is_in_flight(tmp_path):
    with chatting(tmp_path) as server:
        for person in range(1, 6):
            server.say(person, "Slow?")
        server.wait(lambda: len(server.called("sendChatAction")) >= 5, "typing")
        assert not server.messages
        server.process.terminate()
        server.process.join(60)
        assert [server.reply(person)["text"] for person in range(1, 6)] == ["Slow?\n\n<Slow?> & more."] * 5
        assert not server.updates or int(server.called("getUpdates")[-1]["offset"]) > server.updates[-1][0]


def test_a_token_that_is_revoked_ends_the_bot(tmp_path):
    with chatting(tmp_path, exits=1) as server:
        with server.changed:
            server.valid = False
            server.changed.notify_all()
        server.process.join(60)
        assert "ask @BotFather for another" in server.log() and "Traceback" not in server.log()


@pytest.mark.parametrize(
    "said, token, database, address",
    [
        ("Telegram refuses the token", f"{tg.TOKEN}x", "", ""),
        ("http://127.0.0.1:9 does not answer as Telegram", tg.TOKEN, "", "http://127.0.0.1:9"),
        ("does not answer as Telegram", tg.TOKEN, "", ""),
        ("TELEGRAM_BOT_TOKEN", "tell-nobody", "", ""),
        ("JOKES_DATABASE_URL", tg.TOKEN, "mysql://bot:tell-nobody@127.0.0.1/jokes", ""),
    ],
    ids=["refused", "no network", "no Telegram", "malformed", "mysql"],
)
def test_it_says_what_is_wrong_and_not_the_token(said, token, database, address, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(bot, "load_sources", lambda urls: {"model": echo})
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", token)
    monkeypatch.setenv("JOKES_DATABASE_URL", database or f"sqlite:///{tmp_path}/jokes.db")
    asyncio.set_event_loop(asyncio.new_event_loop())
    with tg.telegram() as server:
        server.answers["getMe"] += [(f"<html>{tg.TOKEN}</html>", 200)] * 9  # to who has the right token
        monkeypatch.setattr(sys, "argv", ["helpers", "bot", "x.csv", "--base-url", address or server.url])
        with pytest.raises(SystemExit, match="1"):
            runpy.run_module("helpers", run_name="__main__")  # python -m helpers
    log = "".join(capfd.readouterr()) + caplog.text
    assert said in log and not re.search(f"Traceback|tell-nobody|{tg.TOKEN.split(':')[1]}", log), log


def test_models_and_people_tell_jokes_side_by_side(monkeypatch, sqlite, tmp_path):
    config, tiny = language.GPT2Config, dict(n_embd=8, n_layer=1, n_head=1)
    monkeypatch.setattr(language, "GPT2Config", lambda **sizes: config(**sizes | tiny))

    def load(url):
        joker = language.Joker(*language.load_base("small", PAIRS * 20, 24))
        joker.model.config.base_model = url[:5]
        return joker

    monkeypatch.setattr(language, "load", load)
    human, empty = f"{tmp_path}/human.csv", f"{tmp_path}/empty.csv"
    storage.write(human, b"ID,Question,Answer\n1,Why did it smile?,The night was bright.\n")
    storage.write(empty, b"ID,Question,Answer\n")
    sources = bot.load_sources(["first", "other", "other again", human])
    assert list(sources) == ["first", "other", "other again", "human.csv"]  # what the votes are to compare
    with joke_bot(sources, stock=0, seed=0) as jokes:
        asked = [jokes.ask(i, "Why?" if i % 2 else None) for i in range(40)]
        told = [future.result(60) for future in asked]
    assert {question for _, question, _ in told[1::2]} == {"Why?"} and all(answer for *_, answer in told)
    assert [{source for source, *_ in told[i::2]} for i in (0, 1)] == [{*sources}, {*sources} - {"human.csv"}]
    with joke_bot({"people": sources["human.csv"]}) as jokes, pytest.raises(bot.Busy, match="cannot answer questions"):
        jokes.ask("me", "Why?")
    for url, said, options in (
        (empty, "holds no jokes", {}),
        ("first", "first tells no jokes with {'temperature': 0.0}", dict(temperature=0.0)),
    ):
        with pytest.raises(storage.StorageError, match=said):
            bot.load_sources([url], **options)

    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", tg.TOKEN)
    monkeypatch.setattr(telegram_bot, "serve", lambda jokes, *_: served.append(jokes) or jokes.close())
    options, served = "--temperature 0.7 --top-k 5 --top-p 0.5 --repetition-penalty 1.3 --stock 0".split(), []
    telegram_bot.main(["first", human, *options])
    assert list(served[0].sources) == ["first", "human.csv"]
    assert served[0].sources["first"].keywords == dict(temperature=0.7, top_k=5, top_p=0.5, repetition_penalty=1.3)


def test_the_models_of_a_bucket_are_found(embedded, bucket):
    storage.create_bucket(bucket)
    for name in "jokes/config.json", "jokes-small/config.json", "jokes-half/model.safetensors", "convert/config.json":
        storage.write(f"s3://{bucket}/models/{name}", b"")
    names = dict(bucket=bucket, jokes_csv="human.csv", requests=1, liked_votes=5, liked_above=0.5, seed=0)
    of_bucket = [f"s3://{bucket}/models/jokes", f"s3://{bucket}/models/jokes-small"]
    for given, found in ([], of_bucket), ("a.csv jokes-small", ["a.csv", "jokes-small"]):
        page = run_cells("07a", "def find_models", names=dict(names, model_urls=given, load_sources=list))
        assert page["sources"] == [*found, "human.csv"]


def test_the_panel_of_the_notebook(sqlite):
    with joke_bot({"model": echo}, per_minute=3, stock=0) as jokes:
        names = dict(jokes=jokes, sources={"people": bot.People(PAIRS)}, human="people", display=print)
        shown = run_cells("07a", "def panel", "def picture", names=names)
        assert "Both &lt; lean" in shown["picture"](bot.Joke(question=PAIRS[0][0], answer=PAIRS[0][1]), "👍").data
        panel = shown["panel"](jokes)
        (question, tell), shown, buttons = panel.children[0].children, panel.children[1], panel.children[2]
        question.value = "Why <b>so</b> & not?"
        tell.click()
        assert "Why &lt;b&gt;so&lt;/b&gt; &amp; not?" in shown.value and buttons.layout.visibility == "visible"
        for button, counted in zip(buttons.children, ((1, 1, 1), (1, 1, 0))):
            button.click()
            assert "Thank you for your feedback" in shown.value and bot.tally(asked=True) == {"model": counted}
        for _ in range(3):
            tell.click()
        assert "seconds" in shown.value and buttons.layout.visibility == "hidden"


def test_the_statistics_of_the_notebook():
    names = run_cells("07a", "def holm")
    assert names["votes_needed"](0.5, 0.6) == 388  # Fleiss' formula, as tables and G*Power have it
    assert names["holm"]([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(…, "holm")


def test_a_password_is_no_parameter_and_the_notebook_is_for_one_process(monkeypatch):
    for url in "postgresql://bot:p@127.0.0.1/jokes", "postgresql://127.0.0.1/jokes?password=p":
        with pytest.raises(ValueError, match="JOKES_DATABASE_URL"):
            run_cells("07a", "database_url has a password", names=dict(database_url=url))
    for url in "", "postgresql://bot@127.0.0.1:5432/jokes", "sqlite:////a:b.db":
        run_cells("07a", "database_url has a password", names=dict(database_url=url))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(storage.StorageError, match="run notebook 07 without --processes"):
        run_cells("07a", "WORLD_SIZE", names=dict(database_url=""))
