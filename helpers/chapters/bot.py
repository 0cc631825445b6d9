"""The joke bot: one worker tells jokes of several sources to many people, and SQL keeps what they think of them.

A source is any function of a list of questions that returns a (question, answer) for each; the question None asks for a
whole joke. `python -m helpers.chapters.bot` runs the bot on Telegram; notebook 07 has the same bot behind a few widgets.
"""

import argparse
import asyncio
import logging
import os
import random
import re
import secrets
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import peewee
from playhouse import db_url
from telegram import InlineKeyboardButton, InlineKeyboardMarkup, Update
from telegram.error import BadRequest, Forbidden, InvalidToken, NetworkError, RetryAfter, TelegramError, TimedOut
from telegram.ext import Application, BaseRateLimiter, CallbackQueryHandler, CommandHandler, MessageHandler, filters
from telegram.request import HTTPXRequest

from helpers import storage

LONGEST = 200, 1500  # characters of a question and of an answer: a message of Telegram takes 4,096
THANKS = "Thank you for your feedback"

# ------------------------------------------------------------------------------------------------------------ ratings

_database = peewee.DatabaseProxy()


class Joke(peewee.Model):
    """A joke as somebody was told it."""

    id = peewee.BigAutoField()
    source = peewee.TextField()
    question = peewee.TextField()
    answer = peewee.TextField()
    told = peewee.DoubleField(default=time.time)  # seconds since 1970

    class Meta:
        database = _database


class Vote(peewee.Model):
    """What a person thinks of a joke; the key makes it one vote."""

    joke = peewee.ForeignKeyField(Joke)
    person = peewee.TextField()
    liked = peewee.BooleanField()
    voted = peewee.DoubleField(default=time.time)

    class Meta:
        database = _database
        primary_key = peewee.CompositeKey("joke", "person")


def connect(url=""):
    """Keep the votes in sqlite:///file or postgresql://user:password@host:port/name; returns where that is, in words.

    Without a url: in JOKES_DATABASE_URL, and without that in runs/jokes.db. PostgreSQL takes PGPASSWORD and ~/.pgpass.
    Raises StorageError, without the password, for what is no such URL and for a database that cannot be used.
    """
    url = url or os.environ.get("JOKES_DATABASE_URL") or f"sqlite:///{storage.REPOSITORY / 'runs/jokes.db'}"
    try:
        parts, path = urlsplit(url), Path(url.removeprefix("sqlite:///"))
        unquoted = parts.fragment or "@" in parts.path + parts.query  # where a # or / in a password leads
        if parts.scheme == "sqlite" and len(parts.path) > 1:  # WAL: who reads does not wait for the one who writes
            path.parent.mkdir(parents=True, exist_ok=True)
            place, options = path, {"pragmas": {"journal_mode": "wal", "foreign_keys": 1}, "timeout": 30}
        elif parts.scheme == "postgresql" and len(parts.path) > 1 and not unquoted:
            place = f"{parts.hostname}:{parts.port or 5432}{parts.path}"
            options = {"prefer_psycopg3": True, "connect_timeout": 10}
        else:
            raise ValueError
        database = db_url.connect(url, unquote_password=True, unquote_user=True, **options)
    except ValueError:  # its own words may hold a part of the password
        raise storage.StorageError("The database of the votes (JOKES_DATABASE_URL) must be sqlite:///file or "
                                   "postgresql://user:password@host:port/name, with special characters of the password "
                                   "percent-encoded; this is neither.") from None
    except OSError as error:
        raise storage.StorageError(f"The votes cannot be kept in {path}: {error.strerror}.") from None
    database.place = f"{parts.scheme}: {place}"
    _database.initialize(database)
    with ratings():
        database.create_tables([Joke, Vote])
    return database.place


@contextmanager
def ratings():
    """A connection for the block, a new one each time: no idle hour and no restarted server can have broken it."""
    try:
        with _database.connection_context():
            yield
    except peewee.PeeweeException as error:
        said = " ".join(str(error).split())
        raise storage.StorageError(f"The votes cannot be kept in {_database.place}: {said}") from None


def record(source, question, answer):
    """Keep a joke that is told now; returns the Joke, by whose id there are votes."""
    with ratings():
        return Joke.create(source=source, question=plain(question, LONGEST[0]), answer=plain(answer, LONGEST[1]))


def vote(joke, person, liked):
    """A person likes the joke of this id or not, whatever they said before; returns the Joke, None if there is none."""
    with ratings():
        told = Joke.get_or_none(id=joke)
        if told:  # one statement, and so all or nothing
            Vote.insert(joke=told, person=str(person), liked=liked).on_conflict(
                conflict_target=[Vote.joke, Vote.person], preserve=[Vote.liked, Vote.voted]).execute()
        return told


def tally():
    """{source: (jokes told, votes, votes that like it)}."""
    jokes = peewee.fn.COUNT(Joke.id.distinct())
    likes = peewee.fn.COUNT(peewee.Case(None, [(Vote.liked, 1)]))
    with ratings():
        rows = (Joke.select(Joke.source, jokes, peewee.fn.COUNT(Vote.person), likes)
                .join(Vote, peewee.JOIN.LEFT_OUTER).group_by(Joke.source).order_by(Joke.source))
        return {source: tuple(counts) for source, *counts in rows.tuples()}


def plain(text, limit):
    """A text that every database and Telegram take, cut: no half characters, no zero bytes."""
    return text.encode(errors="ignore").decode().replace("\0", "")[:limit]


# ------------------------------------------------------------------------------------------------------------ sources


def written(pairs, seed=None):
    """A source of human-written jokes: any of these (question, answer); to a question, the answer to the most alike."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: it takes a second

    words, chance = TfidfVectorizer(), random.Random(seed)
    known = words.fit_transform([question for question, _ in pairs])

    def tell(questions):
        told = []
        for question in questions:
            alike = known @ words.transform([question or ""]).T  # (jokes, 1): 0 where no word is shared
            told.append(pairs[alike.toarray().argmax()] if alike.nnz else chance.choice(pairs))
        return [(theirs if question is None else question, answer)
                for question, (theirs, answer) in zip(questions, told)]
    return tell


def sources(urls):
    """{name: source}: of models of notebook 05, by their URLs (`jokes.load`), and of .csv files, by their names."""
    from helpers.chapters import jokes  # here: transformers take their time

    found = {}
    for url in urls:
        if url.endswith(".csv"):
            pairs, _ = jokes.clean(jokes.read(url)[0])
            if not pairs:
                raise storage.StorageError(f"{url} holds no jokes.")
            found[url.rpartition("/")[2]] = written(pairs)
        else:
            found[url] = jokes.load(url).tell
    return found


class Busy(Exception):
    """What to say politely to somebody who gets no joke right now."""


class JokeBot:
    """Tells jokes of several sources, each time of one drawn at random; who asks is not told which.

    sources: {name: source}. One thread calls them all, so a model serves one batch after the other, whoever asks, and
    its memory does not grow. Requests that wait are gathered into batches of up to `batch` for one source; at most
    `queue` of them wait, and a person gets `per_minute` jokes: more is Busy. When nobody waits, the thread fills up a
    stock of `stock` whole jokes per source, which are told at once.
    """

    GATHER = 0.02  # seconds the first request waits for others: those who got their jokes together ask again together

    def __init__(self, sources, batch=16, queue=64, stock=32, per_minute=20, seed=None):
        self.sources, self.batch, self.queue, self.stock, self.per_minute = sources, batch, queue, stock, per_minute
        self.random, self.changed, self.closed = random.Random(seed), threading.Condition(), False
        self.waiting = deque()  # of (source, question, future)
        self.ready = {source: deque() for source in sources}  # of (question, answer)
        self.rest = dict.fromkeys(sources, 0.0)  # until when not to ask a source that failed for its stock
        self.minute, self.asked = 0, Counter()
        self.worker = threading.Thread(target=self._work, name="jokes", daemon=True)
        self.worker.start()

    def ask(self, person, question=None):
        """A concurrent.futures.Future of (source, question, answer), to be given to `record`. Raises Busy."""
        with self.changed:
            minute, second = divmod(int(time.monotonic()), 60)
            if minute != self.minute:
                self.minute, self.asked = minute, Counter()
            if self.closed:
                raise Busy("I have to go now. Please ask me again later.")
            if self.asked[person] >= self.per_minute:
                raise Busy(f"You are faster than I am! Please ask me again in {60 - second} seconds.")
            source, future = self.random.choice(list(self.sources)), Future()
            if question is None and self.ready[source]:
                future.set_result((source, *self.ready[source].popleft()))
            elif len(self.waiting) < self.queue:
                self.waiting.append((source, question, future))
            else:
                raise Busy("I am busy, so many people want a joke! Please try again in a moment.")
            self.asked[person] += 1
            self.changed.notify_all()
            return future

    def tell(self, person, question=None):
        """A Joke, told and recorded; waits for it. Raises Busy."""
        return record(*self.ask(person, question).result())

    def close(self):
        """Tell those who wait their jokes, and end. Later requests are Busy."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.worker.join()

    def _work(self):
        while job := self._next():
            source, requests = job
            try:
                told = self.sources[source]([question for question, _ in requests]) if requests else []
                for (_, future), pair in zip(requests, told, strict=True):
                    if future is None:
                        self.ready[source].append(tuple(pair))
                    else:
                        future.set_result((source, *pair))
            except Exception as error:  # of the source: the next batch has another chance
                logging.getLogger(__name__).exception("the source %s failed", source)
                self.rest[source] = time.monotonic() + 10
                for _, future in requests:
                    if future and not future.done():
                        future.set_exception(error)

    def _next(self):
        """The source and [(question, future)] of the next batch, the future None for the stock; None at the end."""
        with self.changed:
            while not self.waiting:
                low = [source for source in self.sources if time.monotonic() > self.rest[source]
                       and len(self.ready[source]) <= self.stock - self.batch]
                if self.closed:
                    return None
                if low:
                    return min(low, key=lambda source: len(self.ready[source])), [(None, None)] * self.batch
                self.changed.wait(1)
            source, until = self.waiting[0][0], time.monotonic() + self.GATHER
            while not self.closed and sum(name == source for name, *_ in self.waiting) < self.batch:
                if not self.changed.wait(until - time.monotonic()):
                    break
            mine = [request for request in self.waiting if request[0] == source][:self.batch]
            self.waiting = deque(request for request in self.waiting if request not in mine)
            return source, [(question, future) for _, question, future in mine
                            if future.set_running_or_notify_cancel()]


def as_html(joke, mark=""):
    """A joke in the HTML of Telegram; with the mark of a vote, thanks for it."""
    text = f"<b>{escape(joke.question, quote=False)}</b>\n\n{escape(joke.answer, quote=False)}"
    return text + (f"\n\n<i>{THANKS}</i> {mark}" if mark else "")


# ----------------------------------------------------------------------------------------------------------- Telegram


class Front:
    """What the bot does with what comes in over Telegram. owner: the number of the user who may see /stats."""

    HELP = ("I tell jokes. /joke for one, or ask me a question and I will answer it.\n"
            "Then tell me with 👍 or 👎 what you think of it; you can change your mind.")

    def __init__(self, bot, owner=None):
        self.bot, self.owner, self.refused = bot, owner, None

    async def help(self, update, context):
        await update.effective_message.reply_text(self.HELP)

    async def other(self, update, context):
        await update.effective_message.reply_text("I can only read text, sorry. " + self.HELP)

    async def joke(self, update, context):
        message = update.effective_message
        question = plain(message.text, LONGEST[0]) if context.args is None else None  # they are a list after /joke
        typing = asyncio.create_task(self._typing(update.effective_chat))
        try:
            told = await asyncio.wrap_future(self.bot.ask(update.effective_user.id, question))
            joke = await asyncio.to_thread(record, *told)
        except Busy as busy:
            return await message.reply_text(str(busy))
        finally:
            typing.cancel()
        cut = question and len(message.text) > LONGEST[0]
        notice = f"\n\n<i>(I read the first {LONGEST[0]} characters of your message.)</i>" * bool(cut)
        buttons = [InlineKeyboardButton(mark, callback_data=f"{mark}{joke.id}") for mark in "👍👎"]
        await message.reply_html(as_html(joke) + notice, reply_markup=InlineKeyboardMarkup([buttons]))

    async def _typing(self, chat):
        await asyncio.sleep(0.1)  # a joke of the stock is there by then
        with suppress(TelegramError):
            while True:
                await chat.send_action("typing")
                await asyncio.sleep(4)  # it shows for five seconds

    async def vote(self, update, context):
        query = update.callback_query
        found = re.fullmatch(r"([👍👎])(\d{1,18})", query.data or "")
        joke = found and await asyncio.to_thread(vote, int(found[2]), query.from_user.id, found[1] == "👍")
        with suppress(BadRequest):  # pressed long ago: the vote counts all the same
            await query.answer(THANKS if joke else "I no longer know this joke, sorry.")
        if joke and query.message and query.message.is_accessible:
            with suppress(BadRequest):  # the same one twice: there is nothing to change
                await query.edit_message_text(as_html(joke, found[1]), "HTML", reply_markup=query.message.reply_markup)

    async def stats(self, update, context):
        if update.effective_user.id != self.owner:
            return await self.help(update, context)
        from scipy.stats import binomtest  # here: it takes a second

        lines = []
        for source, (jokes, votes, likes) in (await asyncio.to_thread(tally)).items():
            lines.append(f"{source}: {jokes} told, {votes} votes")
            if votes:
                low, high = binomtest(likes, votes).proportion_ci(method="wilson")
                lines[-1] += f", liked by {likes / votes:.0%} (95%: {low:.0%} to {high:.0%})"
        await update.effective_message.reply_text("\n".join(lines) or "Nothing was told yet.")

    async def error(self, update, context):
        if update is None:  # of polling, which goes on by itself
            logging.getLogger(__name__).warning("Telegram: %s", context.error)
            if isinstance(context.error, Forbidden):
                self.refused = context.error
                context.application.stop_running()
            return
        logging.getLogger(__name__).error("an update failed", exc_info=context.error)
        if update.effective_chat and not isinstance(context.error, Forbidden):  # who blocked the bot
            with suppress(TelegramError):
                await update.effective_chat.send_message("Something went wrong, sorry. Please try again.")


class Patience(BaseRateLimiter):
    """Asks Telegram again when it says so, and after faults of its servers."""

    async def initialize(self):
        pass

    async def shutdown(self):
        pass

    async def process_request(self, callback, args, kwargs, endpoint, data, rate_limit_args):
        for pause in (0.5, 1, 2, 4):
            try:
                return await callback(*args, **kwargs)
            except RetryAfter as error:
                if (pause := error.retry_after) > 60:
                    raise
            except NetworkError as error:
                if isinstance(error, (BadRequest, TimedOut)):  # our fault; and the message that may well be there
                    raise
            await asyncio.sleep(pause)
        return await callback(*args, **kwargs)


class Updates(HTTPXRequest):
    """Asks for updates. Malformed ones are left out: the library would ask for them again and again."""

    async def do_request(self, *args, **kwargs):
        code, payload = await super().do_request(*args, **kwargs)
        if code in (401, 404):  # here the library would stop to poll, and not end
            raise Forbidden("the token is no longer valid")
        return code, payload

    @staticmethod
    def parse_json_payload(payload):
        answer = HTTPXRequest.parse_json_payload(payload)
        if not isinstance(answer, dict) or answer.get("ok") and not isinstance(answer.get("result"), list):
            raise TelegramError("what came is no answer of the Bot API")
        if answer.get("ok"):
            numbered = [update for update in answer["result"] if isinstance(update, dict)
                        and type(update.get("update_id")) is int]
            answer["result"] = [update if Updates.whole(update) else {"update_id": update["update_id"]}
                                for update in numbered]  # the number alone confirms it
        return answer

    @staticmethod
    def whole(update):
        try:
            return Update.de_json(update, None)
        except Exception as error:  # KeyError, TypeError, AttributeError, …
            logging.getLogger(__name__).warning("a malformed update is left out: %r", error)


def serve(bot, token, owner=None, base_url="https://api.telegram.org", webhook=None, listen="127.0.0.1", port=8443):
    """Run a JokeBot on Telegram until SIGTERM or Ctrl-C; what people asked for by then they get. Closes the bot.

    base_url: another than Telegram's own is that of a local Bot API server. webhook: the https address that Telegram
    shall call, which a web server passes on to `listen`:`port`; without, the bot polls. Raises TelegramError.
    """
    front, new = Front(bot, owner), filters.UpdateType.MESSAGE
    application = (Application.builder().token(token).base_url(f"{base_url}/bot").rate_limiter(Patience())
                   .get_updates_request(Updates()).concurrent_updates(256).build())
    application.add_handlers([CommandHandler("joke", front.joke, new), CommandHandler("stats", front.stats, new),
                              MessageHandler(filters.COMMAND & new, front.help),
                              MessageHandler(filters.TEXT & new, front.joke),
                              MessageHandler(~filters.StatusUpdate.ALL & new, front.other),
                              CallbackQueryHandler(front.vote)])
    application.add_error_handler(front.error)
    options = {"allowed_updates": ["message", "callback_query"]}
    try:
        if webhook:
            application.run_webhook(listen, port, urlsplit(webhook).path, webhook_url=webhook,
                                    secret_token=secrets.token_urlsafe(), **options)
        else:
            application.run_polling(**options)
    finally:
        bot.close()
    if front.refused:
        raise front.refused


class Redacted(logging.Formatter):
    """Log records, tracebacks included, without the secrets of the environment."""

    def format(self, record):
        return storage.redact(super().format(record))[0]


def main(argv=None):
    parser = argparse.ArgumentParser("python -m helpers.chapters.bot", description="The joke bot on Telegram. Its token is in "
                                     "TELEGRAM_BOT_TOKEN, the database of the votes in JOKES_DATABASE_URL.")
    parser.add_argument("sources", nargs="*", default=["s3://deep-learning/models/jokes", "data_samples/jokes.csv"],
                        help="folders of models, and .csv files of human-written jokes; %(default)s")
    parser.add_argument("--owner", type=int, default=os.environ.get("TELEGRAM_OWNER_ID"),
                        help="the number of the user who may see /stats; TELEGRAM_OWNER_ID")
    parser.add_argument("--base-url", default="https://api.telegram.org", help="of a local Bot API server; %(default)s")
    parser.add_argument("--webhook", metavar="URL", help="the address that Telegram calls; without, the bot polls")
    parser.add_argument("--listen", default="127.0.0.1", help="where the calls come in; %(default)s")
    parser.add_argument("--port", type=int, default=8443, help="and %(default)s")
    options = vars(parser.parse_args(argv))
    log = logging.StreamHandler()
    log.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[log])  # warnings: httpx would tell every address, and the token is a part of it
    logging.getLogger("telegram").setLevel(logging.CRITICAL)  # its errors come to Front.error, or here
    sys.excepthook = lambda *error: logging.critical("the bot ends", exc_info=error)
    token, urls = os.environ.get("TELEGRAM_BOT_TOKEN", ""), options.pop("sources")
    if not re.fullmatch(r"\d+:[\w-]{30,}", token):
        parser.exit(1, "There is no bot's token (123456789:ABC…) in TELEGRAM_BOT_TOKEN: ask @BotFather for one.\n")
    try:
        if any(url.startswith("s3://") for url in urls):
            storage.connect()
        print(f"Votes are kept in {connect()}", flush=True)
        serve(JokeBot(sources(urls)), token, **options)
    except storage.StorageError as error:
        parser.exit(1, f"{error}\n")
    except (Forbidden, InvalidToken):
        parser.exit(1, "Telegram refuses the token in TELEGRAM_BOT_TOKEN: ask @BotFather for another.\n")
    except TelegramError as error:
        parser.exit(1, storage.redact(f"{options['base_url']} does not answer as Telegram: {error}\n")[0])


if __name__ == "__main__":
    main()
