"""The joke bot in processes of its own, which are forked from one that has imported what it takes."""

import itertools
import logging
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from helpers.chapters import bot, telegram_bot

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers.chapters.telegram_bot"])
PAIRS = [
    ("What do <b>bold</b> letters & cats have in common?", 'Both < lean </b> & say "meow".'),
    ("Why did the lighthouse keeper smile?", "The night was bright."),
    ("What is a gardener's favourite novel?", "War and Peas."),
]


def start(function, log, env, *arguments):
    """A process that calls a function, with nothing but this environment; what it says goes to a file."""
    process = FORKS.Process(target=call, args=(function, str(log), env, *arguments), daemon=True)
    process.start()
    return process


def call(function, log, env, *arguments):
    os.environ.clear()
    os.environ.update(env)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))


def model(questions):
    if "Slow?" in questions:
        time.sleep(2)
    if "Fail!" in questions:
        raise ValueError("this joke is not funny")
    return [(question or PAIRS[1][0], f"<{question}> & more.") for question in questions]


def chat(*arguments):
    """`python -m helpers bot`, but for its sources: these take no model."""
    bot.load_sources = lambda urls: {"people": bot.People(PAIRS), "model": model}
    logging.getLogger("httpx").setLevel(logging.INFO)  # as careless as can be
    logging.getLogger().setLevel(logging.INFO)
    telegram_bot.main(arguments)


def vote_for_ever(*jokes):
    """50 people vote at once on jokes of these ids, and say what is counted."""
    bot.connect()

    def vote(person):
        for joke in itertools.cycle(jokes):
            bot.vote(joke, person, True)
            os.write(1, b"%d %d\n" % (joke, person))

    with ThreadPoolExecutor(50) as people:
        people.map(vote, range(50))
