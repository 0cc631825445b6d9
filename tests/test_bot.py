"""The joke bot: votes in SQLite and PostgreSQL, one worker for many people, Telegram as the real library speaks it."""

import contextlib
import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from servers import free_port
from servers import postgres as pg
from servers import telegram as tg

from helpers import storage
from helpers.chapters import bot

ROOT = Path(__file__).resolve().parent.parent
OWNER = 77
PAIRS = [("What do <b>bold</b> letters & cats have in common?", 'Both < lean </b> & say "meow".'),
         ("Why did the lighthouse keeper smile?", "The night was bright."),
         ("What is a gardener's favourite novel?", "War and Peas.")]
numbers = itertools.count()


@pytest.fixture(scope="module")
def postgres():
    if pg.missing():
        pytest.skip(f"PostgreSQL is not installed here, missing: {', '.join(pg.missing())}")
    with pg.postgres() as port:
        yield port


def new_database(port):
    """The URL of a new database in PostgreSQL."""
    name = f"jokes{next(numbers)}"
    pg.query(port, f"CREATE DATABASE {name}")
    return f"postgresql://bot:{quote(pg.PASSWORD, safe='')}@127.0.0.1:{port}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """The URL of a new database, connected."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite")
    url = new_database(request.getfixturevalue("postgres"))
    bot.connect(url)
    return url


@pytest.fixture
def sqlite(tmp_path):
    url = f"sqlite:///{tmp_path}/jokes.db"
    bot.connect(url)
    return url


@contextlib.contextmanager
def joke_bot(*args, **options):
    """A JokeBot that is closed at the end."""
    jokes = bot.JokeBot(*args, **options)
    try:
        yield jokes
    finally:
        jokes.close()


def echo(questions):
    return [(question or "Any joke?", f"{question} it is") for question in questions]


class Gate:
    """A source that answers as `echo` does once it is open, and notes what it was asked, and by which thread."""

    def __init__(self):
        self.opened, self.entered, self.batches, self.threads = threading.Event(), threading.Event(), [], set()
        self.inside, self.most = 0, 0

    def __call__(self, questions):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.threads.add(threading.current_thread().name)
        self.batches.append(list(questions))
        self.entered.set()
        assert self.opened.wait(20)
        self.inside -= 1
        return echo(questions)


# ------------------------------------------------------------------------------------------------------------ votes


def test_a_second_vote_of_the_same_person_replaces_the_first(database):
    one, two = bot.record("human", "Why?", "Because."), bot.record("model", "How?", "So.")
    assert bot.tally() == {"human": (1, 0, 0), "model": (1, 0, 0)}
    told = bot.vote(one.id, 1, True)
    assert (told.question, told.answer) == ("Why?", "Because.")
    bot.vote(one.id, 2, True)
    bot.vote(two.id, 1, False)
    assert bot.tally() == {"human": (1, 2, 2), "model": (1, 1, 0)}
    bot.vote(one.id, 1, False)
    bot.vote(one.id, 1, False)
    assert bot.tally() == {"human": (1, 2, 1), "model": (1, 1, 0)}
    assert bot.vote(10**17, 1, True) is None
    bot.connect(database)  # as after a restart
    assert bot.tally() == {"human": (1, 2, 1), "model": (1, 1, 0)}


def test_any_text_can_be_told(database):
    joke = bot.record("it's; DROP TABLE vote --", "a\0b \ud800 😀 'quoted' \"doubly\" %s", "x" * 5000)
    told = bot.vote(joke.id, "me", True)
    assert told.question == "ab  😀 'quoted' \"doubly\" %s" and 1000 < len(told.answer) < 4000
    assert bot.tally() == {"it's; DROP TABLE vote --": (1, 1, 1)}


def test_fifty_voters_at_once(database):
    jokes = [bot.record(source, "Why?", "Because.").id for source in "aab"]
    start = threading.Barrier(50)

    def person(number):
        start.wait()
        for joke in jokes:
            for liked in (number % 3 != 0, number % 3 == 0):  # the second one counts
                bot.vote(joke, number, liked)

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(person, range(50)))
    assert bot.tally() == {"a": (2, 100, 2 * 17), "b": (1, 50, 17)}


VOTERS = """
import itertools, os, sys, threading
from helpers.chapters import bot
bot.connect()
def person(number):
    for joke in itertools.cycle(range(1, 101)):
        bot.vote(joke, number, True)
        os.write(1, b"%d %d\\n" % (joke, number))
for number in range(25):
    threading.Thread(target=person, args=(int(sys.argv[1]) + number,)).start()
"""


def test_no_vote_is_lost_when_the_voters_are_killed(database):
    for _ in range(100):
        bot.record("model", "Why?", "Because.")
    env = {**os.environ, "JOKES_DATABASE_URL": database}
    processes = [subprocess.Popen([sys.executable, "-c", VOTERS, first], stdout=subprocess.PIPE, env=env, cwd=ROOT)
                 for first in ("0", "25")]  # 50 voters in all
    counted = []
    try:
        for process in processes:  # until both are at it
            counted += [process.stdout.readline() for _ in range(60)]
    finally:
        for process in processes:
            process.kill()
    for process in processes:
        counted += process.stdout.read().splitlines(keepends=True)
        assert process.wait() == -signal.SIGKILL
    counted = {line.decode().strip() for line in counted if line.endswith(b"\n")}

    def there():
        with bot.connection():
            return {f"{vote.joke_id} {vote.person}": vote.liked for vote in bot.Vote.select()}

    before = there()
    assert len(counted) >= 100 and counted <= before.keys() and len(before.keys() - counted) <= 50  # not printed yet
    assert bot.tally() == {"model": (100, len(before), len(before))}
    for number in range(50):  # and life goes on
        bot.vote(1, number, False)
    assert there() == {**before, **{f"1 {number}": False for number in range(50)}}


@pytest.mark.parametrize("name", ["what#is?this=1 &.db", "a%20b+c.db"])
def test_a_file_of_any_name_is_private_and_keeps_the_votes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "REPOSITORY", tmp_path / "C#?")
    monkeypatch.delenv("JOKES_DATABASE_URL", raising=False)
    for url, path in (("", tmp_path / "C#?/runs/jokes.db"), (f"sqlite:///{tmp_path / name}", tmp_path / name)):
        assert bot.connect(url) == f"sqlite: {path}"
        bot.vote(bot.record("human", "Why?", "Because.").id, 1, True)
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)  # as an older version left it
        bot.connect(url)
        assert path.stat().st_mode & 0o777 == 0o600 and bot.tally() == {"human": (1, 1, 1)}
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    with pytest.raises(storage.StorageError):
        bot.connect(f"sqlite:///{folder}")
    assert folder.stat().st_mode & 0o777 == 0o755


def test_postgresql_counts_as_psql_does(postgres):
    url = new_database(postgres)
    bot.connect(url)
    for number in range(7):
        bot.vote(bot.record("model", "Why?", "Because.").id, "me", number % 2 == 0)
    name = url.rpartition("/")[2]
    assert pg.query(postgres, "SELECT count(*), sum(liked::int) FROM vote", name) == "7|4"


def test_a_restarted_server_breaks_nothing(tmp_path):
    if pg.missing():
        pytest.skip(f"PostgreSQL is not installed here, missing: {', '.join(pg.missing())}")
    with pg.postgres() as port:
        bot.connect(new_database(port))
        joke = bot.record("model", "Why?", "Because.")
        assert bot.vote(joke.id, "me", True)
        pg.query(port, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert bot.vote(joke.id, "me", False)
    with pytest.raises(storage.StorageError, match="votes cannot be kept in postgresql: 127.0.0.1"):
        bot.vote(joke.id, "me", True)


SERVER = "postgresql://bot:{}@127.0.0.1"
BAD = {"no scheme": "jokes.db", "mysql": "mysql://bot:{}@127.0.0.1/jokes", "no name": SERVER + ":{port}",
       "not encoded": "postgresql://bot:{raw}@127.0.0.1:{port}/jokes", "no server": SERVER + ":9/jokes",
       "a slash": "postgresql://bot:w:rd/1@127.0.0.1/jokes", "a hash": "postgresql://bot:w:rd#1@127.0.0.1/jokes",
       "a question mark": "postgresql://bot:1?w:rd=w:rd@127.0.0.1/jokes", "no port": SERVER + ":w:rd/jokes",
       "wrong password": "postgresql://bot:{}x@127.0.0.1:{port}/postgres", "no database": SERVER + ":{port}/nowhere",
       "strange option": SERVER + ":{port}/postgres?strange=1",
       "password as an option": "postgresql://bot@127.0.0.1:{port}/nowhere?password={}",
       "no folder": "sqlite:////proc/nowhere/jokes.db", "a folder": "sqlite:////proc", "no file": "sqlite://"}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_database_is_one_clear_error_without_the_password(kind, request, monkeypatch):
    port = request.getfixturevalue("postgres") if "{port}" in BAD[kind] else 9
    encoded = quote(pg.PASSWORD, safe="")
    monkeypatch.setenv("JOKES_DATABASE_URL", BAD[kind].format(encoded, raw=pg.PASSWORD, port=port))
    with pytest.raises(storage.StorageError) as error:
        bot.connect()
    said = "".join(traceback.format_exception(error.value))
    assert not re.search(r"p@ss|p%40ss|w:rd|w%3Ard|rd#1|rd%231", said), said
    assert "database" in str(error.value) or "votes cannot be kept in" in str(error.value)


def test_the_password_of_the_environment_is_enough(postgres, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", pg.PASSWORD)
    url = f"postgresql://bot@127.0.0.1:{postgres}/postgres"
    assert bot.connect(url) == f"postgresql: 127.0.0.1:{postgres}/postgres"
    bot.vote(1, "me", True)


# ---------------------------------------------------------------------------------------------------------- one worker


def test_everybody_gets_their_own_answer_from_one_thread_in_batches(sqlite):
    gate = Gate()
    with joke_bot({"model": gate}, stock=0, queue=500) as jokes:
        gate.opened.set()
        with ThreadPoolExecutor(64) as pool:
            told = list(pool.map(lambda number: jokes.tell(number, f"Question {number}?"), range(300)))
    assert [(joke.question, joke.answer) for joke in told] == echo([f"Question {number}?" for number in range(300)])
    assert gate.threads == {"jokes"} and gate.most == 1
    assert max(map(len, gate.batches)) == 16 and len(gate.batches) < 100
    assert bot.tally() == {"model": (300, 0, 0)}


def test_who_waits_is_gathered_and_too_many_are_politely_refused():
    gate = Gate()
    with joke_bot({"model": gate}, stock=0, queue=40) as jokes:
        first = jokes.ask("me", "First?")
        assert gate.entered.wait(60)
        waiting = [jokes.ask(number, f"{number}?") for number in range(40)]
        with pytest.raises(bot.Busy, match="try again"):
            jokes.ask("late", "Late?")
        assert waiting.pop().cancel()  # who does not want it any more harms nobody
        gate.opened.set()
        answers = [future.result(60) for future in [first, *waiting]]
    assert answers == [("model", *pair) for pair in echo(["First?", *(f"{number}?" for number in range(39))])]
    assert [len(batch) for batch in gate.batches] == [1, 16, 16, 7]


def test_two_hundred_at_once_get_a_joke_or_the_polite_answer(sqlite):
    def slow(questions):
        time.sleep(0.02)
        return echo(questions)

    start = threading.Barrier(200)

    def person(number):
        start.wait()
        try:
            return jokes.tell(number, None if number % 2 else f"{number}?").answer
        except bot.Busy as busy:
            return str(busy)

    with joke_bot({"one": slow, "two": slow}) as jokes, ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(person, range(200)))
    told = [answer for answer in answers if answer.endswith(" it is")]
    assert len(told) >= 64 and all("try again" in answer for answer in answers if answer not in told)
    assert sum(jokes for jokes, *_ in bot.tally().values()) == len(told)


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


def test_sources_are_drawn_evenly_for_each_request():
    with joke_bot({"one": echo, "two": echo, "three": echo}, queue=300, seed=1) as jokes:
        asked = [jokes.ask(person, "Why?") for person in range(300)]
        counts = Counter(future.result(60)[0] for future in asked)
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 70


def test_whole_jokes_are_ready_before_anybody_asks():
    gate, number = Gate(), itertools.count()

    def counted(questions):
        gate(questions)
        return [(f"Joke {next(number)}?", "Yes.") for _ in questions]

    gate.opened.set()
    with joke_bot({"model": counted}, batch=8, stock=16) as jokes:
        for _ in range(200):
            if len(jokes.queue.ready["model"]) == 16:
                break
            time.sleep(0.05)
        gate.opened.clear()
        told = [jokes.ask("me").result(0) for _ in range(16)]  # at once, though the source does not answer
        assert [question for _, question, _ in told] == [f"Joke {i}?" for i in range(16)]
        late = jokes.ask("me")
        assert not late.done()
        gate.opened.set()
        assert late.result(60)[0] == "model"
    assert gate.batches[0] == [None] * 8


def test_a_source_that_fails_is_asked_again():
    def moody(questions):
        if "bad" in questions:
            raise ValueError("no idea")
        return echo(questions)[: None if "short" not in questions else 0]

    with joke_bot({"model": moody}, batch=1) as jokes:
        for question in ("bad", "short"):
            with pytest.raises(ValueError):
                jokes.ask("me", question).result(60)
        assert jokes.ask("me", "good").result(60) == ("model", "good", "good it is")


def test_closing_tells_those_who_wait_and_no_one_else():
    gate = Gate()
    jokes = bot.JokeBot({"model": gate}, stock=0)
    waiting = [jokes.ask(number, f"{number}?") for number in range(30)]
    closing = threading.Thread(target=jokes.close)
    closing.start()
    while not jokes.queue.closed:
        time.sleep(0.01)
    with pytest.raises(bot.Busy, match="later"):
        jokes.ask("late", "Late?")
    gate.opened.set()
    closing.join(60)
    assert all(future.result(0)[0] == "model" for future in waiting) and not jokes.worker.is_alive()


def test_memory_stays_flat():
    def fresh(questions):
        return [(f"{question} {'x' * 100}", "y" * 1000 + str(question)) for question in questions]

    with joke_bot({"model": fresh}) as jokes:
        tracemalloc.start()
        try:
            for number in range(0, 2400, 16):
                if number == 400:
                    before = tracemalloc.get_traced_memory()[0]
                asked = [jokes.ask(number + i, None if i % 2 else f"{number + i}?") for i in range(16)]
                assert all(future.result(60) for future in asked)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 500_000, f"{grown:,} bytes more after 2,000 jokes of 1,100 bytes"


def test_human_jokes_answer_the_question_most_like_yours():
    tell = bot.human_source(PAIRS, seed=0)
    asked = "Tell me: why did the lighthouse keeper smile so much?"
    assert tell([asked, "What novel does a gardener like?"]) == [
        (asked, PAIRS[1][1]), ("What novel does a gardener like?", PAIRS[2][1])]
    whole = tell([None] * 100)
    assert set(whole) == set(PAIRS)
    strange = tell(["Qwxz?"] * 100)
    assert {question for question, _ in strange} == {"Qwxz?"} and len({answer for _, answer in strange}) == 3


# ------------------------------------------------------------------------------------------------------------ Telegram


@contextlib.contextmanager
def process(tmp_path, server, *arguments, code=None, ready=True, **env):
    """A running `python -m helpers bot` (or, for a source of its own, `code`) in front of the server; its log is `log`.

    At the end it is told to stop, and stops in good order; whatever happened, it has not said its token.
    """
    command = [*(["-c", code] if code else ["-m", "helpers", "bot"]), *arguments, "--base-url", server.url]
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env = {**inherited, "TELEGRAM_BOT_TOKEN": tg.TOKEN, "JOKES_DATABASE_URL": f"sqlite:///{tmp_path}/jokes.db", **env}
    with open(tmp_path / "log", "wb") as log:
        running = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   cwd=ROOT, env=env)
    running.log = lambda: (tmp_path / "log").read_text()
    try:
        if ready:
            try:
                server.wait(lambda: server.called("getUpdates") or server.webhook, "the bot")
            except AssertionError as error:
                raise AssertionError(f"{error}; its log: {running.log()}") from None
        yield running
        if ready and running.poll() is None:
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0, running.log()
    finally:
        running.kill()
        running.wait()
        assert tg.TOKEN not in running.log() and tg.TOKEN.split(":")[1] not in running.log()


@pytest.fixture(scope="module")
def jokes_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("jokes") / "human_jokes.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("ID", "Question", "Answer"), *((i, *pair) for i, pair in enumerate(PAIRS))])
    return str(path)


@pytest.fixture(scope="module")
def chat(tmp_path_factory, jokes_csv):
    """A Telegram with a bot that runs on it; two processes of one source would be the same to who asks."""
    directory = tmp_path_factory.mktemp("bot")
    with tg.telegram() as server, process(directory, server, jokes_csv, TELEGRAM_OWNER_ID=str(OWNER)) as running:
        server.process, server.database = running, f"sqlite:///{directory}/jokes.db"
        yield server


def buttons(message):
    """{mark: data} of the buttons below a message."""
    [row] = message["reply_markup"]["inline_keyboard"]
    return {button["text"]: button["callback_data"] for button in row}


def votes(server):
    """(votes, likes) of all sources, read from the file while the bot runs."""
    bot.connect(server.database)
    return tuple(sum(counts) for counts in zip(*(row[1:] for row in bot.tally().values())))


def test_start_explains(chat):
    chat.say(1, "/start")
    assert "/joke" in chat.reply(1)["text"] and "question" in chat.reply(1)["text"]
    chat.say(1, "/nonsense")
    assert chat.reply(1, 1)["text"] == chat.reply(1)["text"]


def test_a_joke_and_an_answer_as_they_are_written(chat):
    for number in range(12):
        chat.say(2, "/joke" if number % 2 else f"/joke@{tg.NAME}")
        message = chat.reply(2, number)
        assert tuple(message["text"].split("\n\n")) in PAIRS  # < and & came through, and no tag of theirs took effect
        assert list(buttons(message)) == ["👍", "👎"]
    chat.say(3, "Why did the <i>lighthouse</i> keeper smile & laugh?")
    assert chat.reply(3)["text"] == f"Why did the <i>lighthouse</i> keeper smile & laugh?\n\n{PAIRS[1][1]}"
    assert list(buttons(chat.reply(3))) == ["👍", "👎"]
    chat.say(3, "What do bold letters and cats have in common?")
    assert chat.reply(3, 1)["text"] == f"What do bold letters and cats have in common?\n\n{PAIRS[0][1]}"


def test_a_vote_is_thanked_for_and_may_be_changed(chat):
    chat.say(4, "/joke")
    message, before = chat.reply(4), votes(chat) or (0, 0)
    joke = message["text"]
    for mark, counted, liked in (("👍", 1, 1), ("👎", 1, 0), ("👎", 1, 0), ("👍", 1, 1)):
        query = chat.press(4, message, buttons(message)[mark])
        chat.wait(lambda: [call for call in chat.called("answerCallbackQuery") if call["callback_query_id"] == query],
                  "the answer to a vote")
        chat.wait(lambda: chat.sent(4)[0]["text"].startswith(f"{joke}\n\nThank you for your feedback {mark}"), "thanks")
        assert votes(chat) == (before[0] + counted, before[1] + liked)
        assert list(buttons(chat.sent(4)[0])) == ["👍", "👎"]
    chat.press(5, message, buttons(message)["👎"])  # somebody else, to whom it was passed on
    chat.wait(lambda: "👎" in chat.sent(4)[0]["text"], "thanks to another")
    assert votes(chat) == (before[0] + 2, before[1] + 1)
    assert len(chat.sent(4)) == 1  # no word of an error


@pytest.mark.parametrize("data", ["👍999999", "👍" + "9" * 30, "like", ""])
def test_a_vote_for_no_joke_gets_an_answer(chat, data):
    chat.say(6, "/joke")
    message, before = chat.reply(6), votes(chat)
    query = chat.press(6, message, data)
    [answer] = chat.wait(lambda: [call for call in chat.called("answerCallbackQuery")
                                  if call["callback_query_id"] == query], "an answer")
    assert "no longer" in answer["text"] and votes(chat) == before
    assert chat.sent(6)[0]["text"] == message["text"]


def test_a_vote_from_elsewhere_is_refused_and_shows_nothing(chat):
    for person, text in ((17, "Why is my secret lighthouse bright?"), (18, "Which novel is mine?"), (18, "/joke")):
        chat.say(person, text)
    secret, mine, other = chat.reply(17), chat.reply(18), chat.reply(18, 1)
    before, data = votes(chat), buttons(secret)["👍"]
    for _ in range(200):  # until all three messages are noted
        with bot.connection():
            if not bot.Message.select().where(bot.Message.number.is_null()).exists():
                break
        time.sleep(0.05)
    forged = [(mine, data), ({**secret, "chat": mine["chat"]}, data), (mine, buttons(other)["👍"]), (None, data)]
    for message, sent in forged:  # of another chat, as if it were mine, of another message, of no message at all
        query = chat.press(18, message, sent)
        [answer] = chat.wait(lambda: [call for call in chat.called("answerCallbackQuery")
                                      if call["callback_query_id"] == query], "an answer")
        assert "no longer" in answer["text"]
    assert votes(chat) == before and chat.sent(18)[0]["text"] == mine["text"]
    chat.press(18, mine, buttons(mine)["👍"])
    chat.wait(lambda: "Thank you" in chat.sent(18)[0]["text"], "thanks")
    assert votes(chat) == (before[0] + 1, before[1] + 1)
    assert not [message for message in chat.sent(18) if "secret" in message["text"]]


def test_a_vote_below_a_message_that_is_too_old_counts(chat):
    chat.say(7, "/joke")
    message, before = chat.reply(7), votes(chat)
    old = {"message_id": message["message_id"], "date": 0, "chat": message["chat"]}
    chat.queries.clear()  # nor can the query be answered any more
    chat.push(callback_query={"id": "1", **{"from": message["chat"] | {"is_bot": False}}, "chat_instance": "1",
                              "data": buttons(message)["👍"], "message": old})
    chat.wait(lambda: votes(chat) == (before[0] + 1, before[1] + 1), "the vote")
    chat.say(7, "/start")
    assert "/joke" in chat.reply(7, 1)["text"]


def test_a_long_message_is_cut_with_a_notice(chat):
    chat.say(8, "Why? " + "lighthouse <&> 😀 " * 230)
    text = chat.reply(8)["text"]
    assert text.startswith("Why? lighthouse") and "the first 200 characters" in text and len(text) < 400
    chat.say(8, "Why is the lighthouse bright?")
    assert "first" not in chat.reply(8, 1)["text"]
    chat.say(8, "gardener's favourite novel " * 10 + "lighthouse keeper smile " * 100)  # as if it ended within the first
    assert "War and Peas." in chat.reply(8, 2)["text"], "who answers reads no more than the first 200 characters"


def test_what_is_no_text_is_refused_politely(chat):
    file = {"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}
    contents = [dict(photo=[file], caption="Why?"), dict(location={"longitude": 1, "latitude": 2}),
                dict(sticker={**file, "type": "regular", "is_animated": False, "is_video": False})]
    for number, content in enumerate(contents):
        chat.say(9, **content)
        assert "I can only read text, sorry" in chat.reply(9, number)["text"]
    chat.say(10, new_chat_title="what Telegram itself says in a chat")
    chat.push(edited_message={"message_id": 1, "date": 1, "edit_date": 2, **tg.person(10), "text": "Why?"})
    chat.push(channel_post={"message_id": 1, "date": 1, "chat": {"id": 10, "type": "channel"}, "text": "Why?"})
    chat.say(10, "/start")
    assert chat.reply(10)["text"].startswith("I tell jokes")  # and nothing to what came before


def test_only_the_owner_sees_the_statistics_and_nobody_the_source(chat):
    chat.say(11, "/stats")
    assert "/joke" in chat.reply(11)["text"]
    chat.say(OWNER, "/stats")
    text = chat.reply(OWNER)["text"]
    assert re.search(r"human_jokes\.csv: \d+ told, \d+ votes, liked by \d+% \(95%: \d+% to \d+%\)", text)
    others = [call for call in chat.calls if call[1].get("chat_id") != str(OWNER)]
    assert len(others) > 10 and "human_jokes" not in json.dumps(others)


def test_a_busy_telegram_gets_everything_in_the_end(chat):
    chat.answers["sendMessage"] += [tg.refusal(429, "Too Many Requests: retry after 1", retry_after=1),
                                    tg.refusal(502, "Bad Gateway"), (0, None)]
    chat.answers["getUpdates"] += [tg.refusal(500, "Internal Server Error"), (200, {"ok": True}), (200, "[1]"),
                                   tg.refusal(429, "Too Many Requests: retry after 1", retry_after=1)]
    chat.say(12, "Why is the lighthouse bright?")
    assert chat.reply(12)["text"].startswith("Why is the lighthouse bright?")
    assert not chat.answers["sendMessage"] and len(chat.sent(12)) == 1
    message = chat.reply(12)
    chat.answers["editMessageText"] += [tg.refusal(429, "Too Many Requests: retry after 1", retry_after=1)]
    chat.press(12, message, buttons(message)["👍"])
    chat.wait(lambda: "Thank you" in chat.sent(12)[0]["text"], "thanks")


def test_malformed_updates_are_left_out(chat):
    chat.push(message="no message")
    chat.push(message={"text": "Why?"})
    chat.push(callback_query={"id": 1})
    chat.push(message={"message_id": 1, "date": "yesterday", **tg.person(13), "text": "Why?"})
    chat.push(update_id="one")
    chat.push(unheard_of={"of": ["a", "newer", "API"]})
    with chat.changed:
        chat.updates.append((next(chat.numbers), "no update"))
    chat.say(13, "/start")
    assert "/joke" in chat.reply(13)["text"]
    chat.wait(lambda: not chat.updates, "the updates to be confirmed")
    assert chat.process.poll() is None


def test_a_user_who_blocked_the_bot_harms_nobody(chat):
    chat.answers["sendMessage"] += [tg.refusal(403, "Forbidden: bot was blocked by the user")]
    chat.say(14, "/start")
    chat.wait(lambda: not chat.answers["sendMessage"], "the attempt")
    chat.say(15, "/start")
    assert "/joke" in chat.reply(15)["text"]


def test_two_hundred_users_at_once(chat):
    people = range(1000, 1200)
    for person in people:
        chat.say(person, "/joke" if person % 2 else "Why is the lighthouse bright?")
    texts = [chat.reply(person)["text"] for person in people]
    jokes = [text for text in texts if "\n\n" in text]
    assert len(jokes) >= 64 and all("try again" in text for text in texts if text not in jokes)
    for number in range(25):
        chat.say(16, "/joke")
    chat.wait(lambda: len(chat.sent(16)) == 25, "25 answers")
    assert sum("seconds" in message["text"] for message in chat.sent(16)) >= 5


QUICK = """
import sys
from helpers.chapters import bot
bot.load_sources = lambda urls: {"echo": lambda questions: [(question or "Any?", "Yes.") for question in questions]}
bot.main(sys.argv[1:])
"""  # without the packages that a model needs
SLOW = """
import os, sys, time
from helpers.chapters import bot
def slow(questions):
    if None not in questions:
        print("generating", flush=True)
        time.sleep(4)
        print("generated", flush=True)
    return [(question or "Any?", f"<{len(questions)}> {question}") for question in questions]
bot.connect()
bot.serve(bot.JokeBot({"slow": slow}), os.environ["TELEGRAM_BOT_TOKEN"], base_url="%s")
print("ended well", flush=True)
"""


def test_sigterm_finishes_what_is_in_flight(tmp_path):
    with tg.telegram() as server, process(tmp_path, server, code=SLOW % server.url) as running:
        for person in range(5):
            server.say(person + 1, f"Question {person}?")
        server.wait(lambda: len(server.called("sendChatAction")) >= 5, "typing")
        while "generating" not in running.log():
            time.sleep(0.05)
        assert "generated" not in running.log() and not server.messages
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0, running.log()
        assert "ended well" in running.log()
        for person in range(5):
            assert re.fullmatch(rf"Question {person}\?\n\n<\d> Question {person}\?", server.reply(person + 1)["text"])
        assert {call["action"] for call in server.called("sendChatAction")} == {"typing"}
        assert not server.updates or int(server.called("getUpdates")[-1]["offset"]) > server.updates[-1][0]


def test_a_webhook(tmp_path):
    port = str(free_port())
    address = f"http://127.0.0.1:{port}/hook"
    with tg.telegram() as server, process(tmp_path, server, "x.csv", "--webhook", address, "--port", port, code=QUICK):
        assert server.webhook["url"] == address and len(server.webhook["secret_token"]) > 20
        for _ in range(200):
            with contextlib.suppress(urllib.error.URLError):
                server.say(1, "/joke")
                break
            time.sleep(0.05)
        message = server.reply(1)
        assert message["text"] == "Any?\n\nYes."
        server.press(1, message, buttons(message)["👍"])
        server.wait(lambda: "Thank you" in server.sent(1)[0]["text"], "thanks")
        server.webhook["secret_token"] = "somebody else"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            server.say(2, "/joke")


@pytest.mark.parametrize("kind", ["refused", "unknown", "no network", "no Telegram", "none", "malformed", "mysql"])
def test_it_says_what_is_wrong_and_not_the_token(kind, tmp_path):
    said, env = "TELEGRAM_BOT_TOKEN", {}
    with tg.telegram() as server:
        if kind == "refused":
            server.valid = False
        if kind == "unknown":
            server.answers["getMe"] += [tg.refusal(404, "Not Found")]
        if kind == "no network":
            server.url, said = "http://127.0.0.1:9", "http://127.0.0.1:9 does not answer as Telegram"
        if kind == "no Telegram":
            server.answers["getMe"] += [(200, f"<html>{tg.TOKEN}</html>")] * 9
            said = "does not answer as Telegram"
        if kind in ("none", "malformed"):
            env = {"TELEGRAM_BOT_TOKEN": {"none": "", "malformed": "tell-nobody"}[kind]}
        if kind == "mysql":
            env, said = {"JOKES_DATABASE_URL": "mysql://bot:tell-nobody@127.0.0.1/jokes"}, "JOKES_DATABASE_URL"
        with process(tmp_path, server, "x.csv", code=QUICK, ready=False, **env) as running:
            assert running.wait(90) == 1
        log = running.log()
        assert said in log and "Traceback" not in log and "tell-nobody" not in log and log.count("\n") <= 2, log


def test_a_token_that_is_revoked_ends_the_bot(tmp_path):
    with tg.telegram() as server, process(tmp_path, server, "x.csv", code=QUICK) as running:
        with server.changed:
            server.valid = False
            server.changed.notify_all()
        assert running.wait(60) == 1
        assert "ask @BotFather for another" in running.log() and "Traceback" not in running.log()


FAILING = """
import logging, os, sys
from helpers.chapters import bot
def failing(questions):
    raise ValueError(os.environ["TELEGRAM_BOT_TOKEN"])
bot.load_sources = lambda urls: {"failing": failing}
logging.getLogger("httpx").setLevel(logging.INFO)  # as careless as can be
logging.getLogger().setLevel(logging.INFO)
bot.main(sys.argv[1:])
"""


def test_an_error_inside_is_logged_without_the_token_and_told_politely(tmp_path):
    with tg.telegram() as server, process(tmp_path, server, "x.csv", code=FAILING) as running:
        server.say(1, "Why?")
        assert "Something went wrong, sorry" in server.reply(1)["text"]
        assert "ValueError: ***" in running.log() and "/getMe" not in running.log()


# ----------------------------------------------------------------------------------------- a model, and the notebook


@pytest.fixture(scope="module")
def notebook():
    """notebook(text): the names that the code cell with this text defines."""
    cells = nbformat.read(ROOT / "notebooks/07_joke_bot.ipynb", as_version=4).cells
    imports = next(cell.source for cell in cells if cell.source.startswith("import itertools"))

    def cell_with(text, **names):
        [source] = [cell.source for cell in cells if cell.cell_type == "code" and text in cell.source]
        names = {**vars(bot), **names}
        exec(imports, names)
        exec(source, names)
        return names
    return cell_with


def test_a_model_and_people_tell_jokes_side_by_side(tmp_path, sqlite, jokes_csv, one_thread):
    from helpers.chapters import jokes as language  # here: it takes a while

    model, tokenizer = language.load_base("", [pair for pair in PAIRS for _ in range(20)], 24)
    language.save(model, tokenizer, tmp_path / "model")
    sources = bot.load_sources([str(tmp_path / "model"), jokes_csv])
    assert list(sources) == [str(tmp_path / "model"), "human_jokes.csv"]
    with joke_bot(sources, batch=4, stock=4, seed=0) as jokes:
        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(lambda i: jokes.tell(i, "Why?" if i % 2 else None), range(16)))
    assert all(joke.question.strip() and joke.answer.strip() for joke in told)
    assert {joke.question for joke in told[1::2]} == {"Why?"} and {joke.source for joke in told} == set(sources)


def test_what_cannot_be_a_source_is_named(tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("ID,Question,Answer\n")
    for url, said in ((str(empty), "holds no jokes"), (str(tmp_path / "none.csv"), "none.csv"),
                      (str(tmp_path / "model"), "NOTEBOOKS=05")):
        with pytest.raises(storage.StorageError, match=said):
            bot.load_sources([url])


def test_the_panel_of_the_notebook(notebook, sqlite):
    with joke_bot({"model": echo}, per_minute=3, stock=0) as jokes:
        panel = notebook("def panel", jokes=jokes)["panel"](jokes)
        (question, tell), shown, buttons = panel.children[0].children, panel.children[1], panel.children[2]
        like, dislike = buttons.children
        question.value = "Why <b>so</b> & not?"
        tell.click()
        assert "Why &lt;b&gt;so&lt;/b&gt; &amp; not?" in shown.value and buttons.layout.visibility == "visible"
        for button, counted in ((like, (1, 1, 1)), (dislike, (1, 1, 0))):
            button.click()
            assert "Thank you for your feedback" in shown.value and bot.tally() == {"model": counted}
        tell.click()
        assert "Thank you" not in shown.value
        tell.click()
        tell.click()
        assert "seconds" in shown.value and buttons.layout.visibility == "hidden"


def test_the_statistics_of_the_notebook(notebook):
    names = notebook("def holm")
    assert names["votes_needed"](0.6, 0.5) == 388  # Fleiss' formula, as tables and G*Power have it
    assert names["votes_needed"](0.5, 0.6) == 388 and names["votes_needed"](0.5, 0.5) == float("inf")
    assert names["holm"]([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(…, "holm")


@pytest.mark.parametrize("url, refused", [
    ("postgresql://bot:p@127.0.0.1/jokes", True), ("postgresql://127.0.0.1/jokes?password=p", True), ("", False),
    ("postgresql://bot@127.0.0.1:5432/jokes", False), ("sqlite:////a:b.db", False)])
def test_a_password_is_no_parameter(notebook, url, refused):
    with pytest.raises(ValueError, match="JOKES_DATABASE_URL") if refused else contextlib.nullcontext():
        notebook("database_url has a password", database_url=url)
