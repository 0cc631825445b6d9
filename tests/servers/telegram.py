"""A small server that speaks the Bot API as far as the joke bot needs it, and is as strict as Telegram.

https://core.telegram.org/bots/api; what it answers to mistakes is what Telegram answers.
"""

import contextlib
import html
import itertools
import json
import logging
import re
import socket
import threading
import time
from collections import defaultdict, deque

import flask
from werkzeug.serving import make_server

TOKEN = "123456789:AAtests-only-0123456789_abcdefghijklm"
BOT = {"id": 123456789, "is_bot": True, "first_name": "Jokes", "username": "jokes_bot"}


@contextlib.contextmanager
def telegram():
    """Run a Telegram as long as the block lasts, in threads of this process."""
    logging.getLogger("werkzeug").disabled = True
    telegram, app = Telegram(), flask.Flask("telegram")
    app.post("/bot<token>/<method>")(telegram.call)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    telegram.url = f"http://127.0.0.1:{server.port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield telegram
    finally:
        server.shutdown()


class Telegram:
    """What people do, and what the bot did: `calls`, a list of (method, parameters).

    answers  {method: deque of (answer, status)}: given instead, one per call; a status of 0 closes the connection
    valid    whether the token is
    """

    def __init__(self):
        self.calls, self.updates, self.messages, self.valid = [], deque(), {}, True
        self.answers, self.changed, self.numbers = defaultdict(deque), threading.Condition(), itertools.count(1)

    def push(self, **content):
        """An update, as it is, malformed or not."""
        number = next(self.numbers)
        with self.changed:
            self.updates.append((number, {"update_id": number, **content}))
            self.changed.notify_all()

    def say(self, user, text="", **content):
        """A message of a user to the bot: text, or something else."""
        if found := re.match(r"/\w+(@\w+)?", text):
            content["entities"] = [{"type": "bot_command", "offset": 0, "length": len(found[0])}]
        message = {"message_id": next(self.numbers), "date": int(time.time()), "text": text, **person(user), **content}
        self.push(message=message)

    def press(self, user, message, data):
        """A user presses the button with this data below a message (None: one sent inline); what the bot answers."""
        query = str(next(self.numbers))
        content = {"message": message} if message else {"inline_message_id": "1"}
        content |= {"id": query, "from": person(user)["from"], "chat_instance": "1", "data": data}
        self.push(callback_query=content)
        calls = lambda: [call for call in self.called("answerCallbackQuery") if call["callback_query_id"] == query]
        return self.wait(calls, "an answer")[0]["text"]

    def wait(self, ready, what):
        """Wait until ready() is true and return that; fails with what the bot did."""
        with self.changed:
            found = self.changed.wait_for(ready, 60)
            assert found, f"waited in vain for {what}; the bot did: {self.calls[-12:]}"
            return found

    def sent(self, user):
        """The messages that a user's chat now holds, as they are after edits."""
        return [message for message in self.messages.values() if message["chat"]["id"] == user]

    def reply(self, user, number=0):
        """The bot's message of this number to the user, waited for."""
        return self.wait(lambda: self.sent(user)[number : number + 1], f"message {number} to {user}")[0]

    def called(self, method):
        """The parameters of all calls of a method."""
        return [parameters for name, parameters in self.calls if name == method]

    def call(self, token, method):
        """The (answer, status) to a call."""
        parameters = flask.request.form.to_dict()
        if token != TOKEN or not self.valid:
            return refusal(401, "Unauthorized")
        with self.changed:
            self.calls.append((method, parameters))
            self.changed.notify_all()
            if self.answers[method]:
                answer, status = self.answers[method].popleft()
                if not status:
                    flask.request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return answer, status or 200
            try:
                result = getattr(self, method)(parameters)
            except ValueError as error:
                return refusal(400, f"Bad Request: {error}")
            self.changed.notify_all()
        return {"ok": True, "result": result}

    def getMe(self, _):
        return BOT

    def deleteWebhook(self, _):
        return True

    sendChatAction = answerCallbackQuery = deleteWebhook

    def getUpdates(self, parameters):
        while self.updates and self.updates[0][0] < int(parameters.get("offset", 0)):
            self.updates.popleft()
        self.changed.wait_for(lambda: self.updates or not self.valid, float(parameters.get("timeout", 0)))
        return [update for _, update in self.updates][:100]

    def sendMessage(self, parameters):
        message = {"message_id": next(self.numbers), "date": int(time.time()), "from": BOT, **written(parameters)}
        message["chat"] = person(int(parameters["chat_id"]))["chat"]
        self.messages[message["message_id"]] = message
        return message

    def editMessageText(self, parameters):
        message, new = self.messages[int(parameters["message_id"])], written(parameters)
        if message == message | new:
            raise ValueError("message is not modified")
        message.update(new)
        return message


def refusal(status, description, **parameters):
    """An answer that refuses."""
    return {"ok": False, "error_code": status, "description": description, "parameters": parameters}, status


def person(user):
    """A user and their chat with the bot."""
    name = {"id": user, "first_name": f"User {user}"}
    return {"from": {**name, "is_bot": False}, "chat": {**name, "type": "private"}}


def written(parameters):
    """The text and buttons of a message, its HTML (in which this bot writes bold and italics) checked and read."""
    text = parameters["text"]
    if parameters.get("parse_mode") == "HTML":
        if not re.fullmatch(r"([^<]|<([bi])>[^<]*</\2>)*", text):
            raise ValueError("can't parse entities")
        text = html.unescape(re.sub("<.*?>", "", text))
    if len(text.encode("utf-16-le")) > 2 * 4096:
        raise ValueError("message is too long")
    buttons = {"reply_markup": json.loads(parameters["reply_markup"])} if "reply_markup" in parameters else {}
    return {"text": text, **buttons}
