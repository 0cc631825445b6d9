"""A small server that speaks the Bot API as far as the joke bot needs it, and is as strict as Telegram.

https://core.telegram.org/bots/api; what it answers to mistakes is what Telegram answers.
"""

import contextlib
import html.parser
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "123456789:AAtests-only-0123456789_abcdefghijklm"
NAME = "jokes_bot"


@contextlib.contextmanager
def telegram():
    """Run a Telegram as long as the block lasts, in threads of this process."""
    with Telegram() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.stopped = True
            with server.changed:
                server.changed.notify_all()
            server.shutdown()


class Telegram(ThreadingHTTPServer):
    """The server's address `url`, what people do, and what the bot did: `calls`, a list of (method, parameters).

    answers  {method: deque of (status, answer)}: given instead, one per call; a status of 0 closes the connection
    valid    whether the token is
    """

    daemon_threads, block_on_close, request_queue_size = True, False, 512

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.changed, self.stopped, self.valid = threading.Condition(), False, True
        self.calls, self.updates, self.messages = [], deque(), {}
        self.queries, self.answers = set(), defaultdict(deque)
        self.numbers = itertools.count(1)

    # ------------------------------------------------------------------------------------------- what people do

    def push(self, **content):
        """An update, as it is, malformed or not."""
        number = next(self.numbers)
        with self.changed:
            self.updates.append((number, {"update_id": number, **content}))
            self.changed.notify_all()

    def say(self, user, text=None, **content):
        """A message of a user to the bot: text, or something else."""
        if text is not None:
            content["text"] = text
            if found := re.match(r"/\w+(@\w+)?", text):
                content["entities"] = [{"type": "bot_command", "offset": 0, "length": len(found[0])}]
        self.push(message={"message_id": next(self.numbers), "date": int(time.time()), **person(user), **content})

    def press(self, user, message, data):
        """A user presses the button with this data below a message of the bot (None: of one that was sent inline)."""
        query = str(next(self.numbers))
        self.queries.add(query)
        below = {"message": message} if message else {"inline_message_id": "1"}
        self.push(
            callback_query={"id": query, "from": person(user)["from"], "chat_instance": "1", "data": data, **below}
        )
        return query

    # ----------------------------------------------------------------------------------------- what the bot did

    def wait(self, ready, what, seconds=60):
        """Wait until ready() is true and return that; fails with what the bot did."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not (found := ready()):
                if not self.changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"waited in vain for {what}; the bot did: {self.calls[-12:]}")
            return found

    def sent(self, user):
        """The messages that a user's chat now holds, as they are after edits."""
        return [message for message in list(self.messages.values()) if message["chat"]["id"] == user]

    def reply(self, user, number=0):
        """The bot's message of this number to the user, waited for."""
        return self.wait(lambda: self.sent(user)[number : number + 1], f"message {number} to {user}")[0]

    def called(self, method):
        """The parameters of all calls of a method."""
        return [parameters for name, parameters in list(self.calls) if name == method]

    # --------------------------------------------------------------------------------------------- the Bot API

    def call(self, token, method, parameters):
        """The (status, answer) to a call."""
        if token != TOKEN or not self.valid:
            return refusal(401, "Unauthorized")
        with self.changed:
            self.calls.append((method, parameters))
            self.changed.notify_all()
            if self.answers[method]:
                return self.answers[method].popleft()
        do = getattr(self, f"on_{method.lower()}", None)
        if not do:
            return refusal(404, "Not Found")
        try:
            result = do(parameters)
        except Refused as refused:
            return refusal(*refused.args)
        with self.changed:
            self.changed.notify_all()
        return 200, {"ok": True, "result": result}

    def on_getme(self, _):
        return {"id": 123456789, "is_bot": True, "first_name": "Jokes", "username": NAME}

    def on_deletewebhook(self, _):
        return True

    def on_getupdates(self, parameters):
        deadline = time.monotonic() + float(parameters.get("timeout", 0))
        with self.changed:
            while self.updates and self.updates[0][0] < int(parameters.get("offset", 0)):
                self.updates.popleft()
            while not self.updates and not self.stopped and self.valid and (left := deadline - time.monotonic()) > 0:
                self.changed.wait(left)
            return [update for _, update in self.updates][:100]

    def on_sendchataction(self, parameters):
        return bool(parameters["action"])

    def on_sendmessage(self, parameters):
        user = int(parameters["chat_id"])
        message = {
            "message_id": next(self.numbers),
            "date": int(time.time()),
            "chat": person(user)["chat"],
            "from": self.on_getme(None),
            **written(parameters),
        }
        self.messages[message["message_id"]] = message
        return message

    def on_editmessagetext(self, parameters):
        message = self.messages.get(int(parameters["message_id"]))
        if not message:
            raise Refused(400, "Bad Request: message to edit not found")
        new = written(parameters)
        if all(message.get(name) == value for name, value in new.items()):
            raise Refused(400, "Bad Request: message is not modified")
        message.update(new)
        return message

    def on_answercallbackquery(self, parameters):
        if parameters["callback_query_id"] not in self.queries:
            raise Refused(400, "Bad Request: query is too old and response timeout expired or query ID is invalid")
        return True


class Refused(Exception):
    """A status and what Telegram says to it."""


def refusal(status, description, **parameters):
    """An answer that refuses."""
    answer = {"ok": False, "error_code": status, "description": description}
    return status, {**answer, "parameters": parameters} if parameters else answer


def person(user):
    """A user and their chat with the bot."""
    return {
        "from": {"id": user, "is_bot": False, "first_name": f"User {user}"},
        "chat": {"id": user, "type": "private", "first_name": f"User {user}"},
    }


def written(parameters):
    """The text and buttons of a message, its HTML checked and read as Telegram does."""
    text = parameters.get("text", "")
    content = {"html": text, "text": text}
    if parameters.get("parse_mode") == "HTML":
        reader = Reader(convert_charrefs=True)
        reader.feed(text)
        reader.close()
        if reader.open or reader.strange or re.search("<(?![/a-z])", text):
            raise Refused(400, f"Bad Request: can't parse entities: {reader.strange or reader.open}")
        content["text"] = "".join(reader.text)
    if not content["text"].strip():
        raise Refused(400, "Bad Request: message text is empty")
    if len(content["text"].encode("utf-16-le")) > 2 * 4096:
        raise Refused(400, "Bad Request: message is too long")
    if "reply_markup" in parameters:
        content["reply_markup"] = json.loads(parameters["reply_markup"])
        for button in itertools.chain(*content["reply_markup"]["inline_keyboard"]):
            if not 1 <= len(button["callback_data"].encode()) <= 64:
                raise Refused(400, "Bad Request: BUTTON_DATA_INVALID")
    return content


class Reader(html.parser.HTMLParser):
    """Reads the few tags that Telegram allows."""

    def __init__(self, **options):
        super().__init__(**options)
        self.text, self.open, self.strange = [], [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag not in ("b", "i", "u", "s", "a", "code", "pre", "blockquote", "tg-spoiler"):
            self.strange.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.strange.append(tag)

    def handle_data(self, data):
        self.text.append(data)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        parameters = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        found = re.fullmatch(r"/bot([^/]+)/(\w+)", urllib.parse.unquote(self.path))
        status, answer = self.server.call(*found.groups(), parameters) if found else refusal(404, "Not Found")
        if not status:
            self.close_connection = True
            return
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass
