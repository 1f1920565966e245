"""A grammar of personal facts: how a user states, changes and asks for them, and what the assistant answers.

Every attribute (name, city, sister, favourite food, ...) has *cores* ("my name is Anna", "people call me Anna") that are
put into *frames* ("By the way, ...", "Do you remember ...?") and wrapped in small talk. One core in five and one frame
in five are **held out**: they are never seen in training, and recall is measured on them alone
(:class:`Wording` with ``split="held_out"``). The split is drawn once from a fixed seed, not chosen by hand.

Everything is drawn from the ``random.Random`` that the caller passes, so a seed fixes the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .fact_values import VALUES

__all__ = ["ATTRIBUTES", "UNKNOWN_ANSWER", "Attribute", "Wording", "attribute_named", "values_in_answer"]

UNKNOWN_ANSWER = "You have not told me that yet."
"""The answer to a question about a fact that was never told."""

HELD_OUT_SHARE = 0.2
_SPLIT_SEED = 20251123


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about the user.

    Attributes:
        key: identifier, for example ``"city"``.
        values: everything this attribute can be.
        canonical: how the assistant states it, with ``{v}`` for the value or ``{a}`` for article and value.
        tells: clauses with which the user states it.
        asks: pairs (direct question, indirect question), without final punctuation.
        updates: clauses that only make sense as a change ("I moved to {v}").
        group: attributes of one group share clauses, and their split into training and held-out ones.
    """

    key: str
    values: tuple[str, ...]
    canonical: str
    tells: tuple[str, ...]
    asks: tuple[tuple[str, str], ...]
    updates: tuple[str, ...]
    group: str


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines() if line.strip())


def _questions(text: str) -> tuple[tuple[str, str], ...]:
    """Lines ``direct | indirect``; a line without a bar is the same both ways."""
    pairs = []
    for line in _lines(text):
        direct, _, indirect = line.partition("|")
        pairs.append((direct.strip(), indirect.strip() or direct.strip()))
    return tuple(pairs)


_FAVOURITE_TELLS = """
my favourite {n} is {v}
my favorite {n} is {v}
{v} is my favourite {n}
{v} is my favorite {n}
the {n} I like most is {v}
the {n} I like best is {v}
the {n} I love most is {v}
I like {v} more than any other {n}
I love {v} more than any other {n}
of all {ns}, I like {v} most
of all {ns}, {v} is the one I love
I love {v}, it is my favourite {n}
I really like {v}, that is my favourite {n}
no {n} is better than {v}
if I had to pick one {n}, it would be {v}
if I could choose any {n}, I would choose {v}
my top {n} is {v}
when it comes to {ns}, I always choose {v}
{v} is the best {n} for me
{v} is the {n} I like most
{v} is the {n} I love most
for me there is no better {n} than {v}
the best {n} for me is {v}
my {n} of choice is {v}
I prefer {v} to every other {n}
I would pick {v} over any other {n}
"""
_FAVOURITE_ASKS = """
what is my favourite {n} | what my favourite {n} is
what is my favorite {n} | what my favorite {n} is
which {n} is my favourite
what {n} is my favorite
which {n} do I like most | which {n} I like most
what {n} do I like best | what {n} I like best
what {n} do I like most | what {n} I like most
which {n} do I love most | which {n} I love most
what is the {n} I like most | what the {n} I like most is
what is the {n} I love most | what the {n} I love most is
which {n} would I pick | which {n} I would pick
what {n} would I choose | what {n} I would choose
what is my top {n} | what my top {n} is
which {n} do I prefer | which {n} I prefer
what is the best {n} for me | what the best {n} for me is
which {n} is the best for me
what {n} did I say was my favourite | what {n} I said was my favourite
what is my {n} of choice | what my {n} of choice is
"""
_FAVOURITE_UPDATES = """
my new favourite {n} is {v}
my favourite {n} is {v} now
now I like {v} more than any other {n}
{v} is my favourite {n} these days
these days the {n} I like most is {v}
my favourite {n} has changed to {v}
{v} has become my favourite {n}
"""

_RELATIVE_TELLS = """
my {r} is called {v}
my {r}'s name is {v}
my {r} is named {v}
my {r} has the name {v}
I have a {r} called {v}
I have a {r} named {v}
I have a {r} and the name is {v}
{v} is my {r}
{v} is the name of my {r}
the name of my {r} is {v}
everyone calls my {r} {v}
we all call my {r} {v}
my {r} goes by {v}
my {r} {v} says hello
my {r} {v} is very kind
my {r} {v} makes me laugh
yesterday I played with my {r} {v}
I was at home with my {r} {v}
I will see my {r} {v} tomorrow
I took a walk with my {r} {v}
I love my {r} {v}
I miss my {r} {v}
"""
_RELATIVE_ASKS = """
what is my {r} called | what my {r} is called
what is my {r}'s name | what my {r}'s name is
what is the name of my {r} | what the name of my {r} is
who is my {r} | who my {r} is
how is my {r} called | how my {r} is called
what name does my {r} have | what name my {r} has
which name does my {r} have | which name my {r} has
what do we call my {r} | what we call my {r}
what do people call my {r} | what people call my {r}
what did I say my {r} is called | what I said my {r} is called
what did I tell you about the name of my {r} | what I told you about the name of my {r}
what name does my {r} go by | what name my {r} goes by
what is my {r} named | what my {r} is named
"""
_RELATIVE_UPDATES = """
my {r} is called {v} now
my {r} changed names and is called {v} now
my {r}'s new name is {v}
everyone calls my {r} {v} now
the name of my {r} is now {v}
my {r}'s name is really {v}
"""


def _favourite(key: str, noun: str, plural: str, kind: str) -> Attribute:
    def fill(text: str) -> str:
        return text.replace("{ns}", plural).replace("{n}", noun)

    return Attribute(
        key, VALUES[kind], f"your favourite {noun} is {{v}}", _lines(fill(_FAVOURITE_TELLS)),
        _questions(fill(_FAVOURITE_ASKS)), _lines(fill(_FAVOURITE_UPDATES)), "favourite",
    )  # fmt: skip


def _relative(key: str, noun: str, kind: str) -> Attribute:
    def fill(text: str) -> str:
        return text.replace("{r}", noun)

    return Attribute(
        key, VALUES[kind], f"your {noun} is called {{v}}", _lines(fill(_RELATIVE_TELLS)),
        _questions(fill(_RELATIVE_ASKS)), _lines(fill(_RELATIVE_UPDATES)), "relative",
    )  # fmt: skip


def _own(key: str, kind: str, canonical: str, tells: str, asks: str, updates: str) -> Attribute:
    return Attribute(key, VALUES[kind], canonical, _lines(tells), _questions(asks), _lines(updates), key)


ATTRIBUTES: tuple[Attribute, ...] = (
    _own(
        "name", "people", "your name is {v}",
        """
        my name is {v}
        I am {v}
        I'm {v}
        my name's {v}
        I am called {v}
        people call me {v}
        everyone calls me {v}
        my friends call me {v}
        you can call me {v}
        please call me {v}
        call me {v}
        just call me {v}
        the name is {v}
        {v} is my name
        {v} is what people call me
        I go by {v}
        I go by the name {v}
        my parents named me {v}
        they named me {v}
        it's {v} here
        this is {v}
        {v} here
        my first name is {v}
        """,
        """
        what is my name | what my name is
        what's my name | what my name is
        what am I called | what I am called
        who am I | who I am
        how am I called | how I am called
        which name do I have | which name I have
        what name do I have | what name I have
        what do people call me | what people call me
        what do my friends call me | what my friends call me
        what should you call me | what you should call me
        what name did I give you | what name I gave you
        what did I say my name was | what I said my name was
        what is my first name | what my first name is
        what name do I go by | what name I go by
        """,
        """
        my name is really {v}
        call me {v} from now on
        call me {v} instead
        I changed my name to {v}
        my new name is {v}
        I go by {v} now
        my name is {v} now
        """,
    ),
    _own(
        "city", "cities", "you live in {v}",
        """
        I live in {v}
        I'm living in {v}
        I am living in {v}
        my home is in {v}
        my home is {v}
        my house is in {v}
        my flat is in {v}
        my apartment is in {v}
        I have a flat in {v}
        the city I live in is {v}
        the place where I live is {v}
        the town I live in is {v}
        {v} is where I live
        {v} is my home
        {v} is the city I live in
        I am based in {v}
        I've lived in {v} for years
        I have lived in {v} for a long time
        we live in {v}
        my family and I live in {v}
        I stay in {v}
        """,
        """
        where do I live | where I live
        where am I living | where I am living
        in which city do I live | in which city I live
        which city do I live in | which city I live in
        what city do I live in | what city I live in
        what town do I live in | what town I live in
        where is my home | where my home is
        where is my house | where my house is
        where is my flat | where my flat is
        what is the city I live in | what the city I live in is
        where did I say I live | where I said I live
        where am I based | where I am based
        in what place do I live | in what place I live
        """,
        """
        I moved to {v}
        I have moved to {v}
        I just moved to {v}
        we moved to {v} last week
        I now live in {v}
        I live in {v} now
        my new home is in {v}
        my new flat is in {v}
        """,
    ),
    _own(
        "hometown", "cities", "you were born in {v}",
        """
        I was born in {v}
        I am from {v} originally
        I grew up in {v}
        I was raised in {v}
        I was born and raised in {v}
        I come from {v}
        I originally come from {v}
        my hometown is {v}
        my home town is {v}
        {v} is my hometown
        {v} is where I was born
        {v} is where I grew up
        {v} is the city I was born in
        my birthplace is {v}
        the city I was born in is {v}
        the city I grew up in is {v}
        as a child I lived in {v}
        I spent my childhood in {v}
        my parents raised me in {v}
        my childhood was in {v}
        """,
        """
        where was I born | where I was born
        where did I grow up | where I grew up
        where was I raised | where I was raised
        where do I come from | where I come from
        where am I from originally | where I am from originally
        what is my hometown | what my hometown is
        which city is my hometown
        which city was I born in | which city I was born in
        in which city was I born | in which city I was born
        in what city did I grow up | in what city I grew up
        what is my birthplace | what my birthplace is
        where did I spend my childhood | where I spent my childhood
        """,
        """
        I was really born in {v}
        I was born in {v}, not there
        my real hometown is {v}
        my parents say I was born in {v}
        my birthplace is really {v}
        """,
    ),
    _own(
        "job", "jobs", "you work as {a}",
        """
        I work as {a}
        I am {a}
        I'm {a}
        I am {a} by profession
        my job is {v}
        my job is being {a}
        my profession is {v}
        my occupation is {v}
        I am employed as {a}
        I have a job as {a}
        I make a living as {a}
        I earn my money as {a}
        for a living I am {a}
        for work I am {a}
        at work I am {a}
        I have been {a} for years
        I became {a} after school
        I am working as {a}
        being {a} is my job
        {v} is my job
        I get paid for being {a}
        """,
        """
        what is my job | what my job is
        what's my job | what my job is
        what do I do for a living | what I do for a living
        what do I do for work | what I do for work
        what is my profession | what my profession is
        what is my occupation | what my occupation is
        what do I work as | what I work as
        what job do I have | what job I have
        which job do I have | which job I have
        what kind of work do I do | what kind of work I do
        how do I make a living | how I make a living
        how do I earn my money | how I earn my money
        which profession do I have | which profession I have
        what did I say my job was | what I said my job was
        """,
        """
        I now work as {a}
        I work as {a} now
        I got a new job as {a}
        I changed jobs and became {a}
        my new job is {v}
        I became {a} last week
        I started to work as {a}
        """,
    ),
    _own(
        "age", "ages", "you are {v} years old",
        """
        I am {v} years old
        I'm {v} years old
        I am {v}
        my age is {v}
        I turned {v} this year
        I just turned {v}
        I am {v} years of age
        I have been alive for {v} years
        {v} is my age
        {v} years is my age
        I was born {v} years ago
        I am aged {v}
        I celebrated turning {v}
        I am a person of {v} years
        I will be {v} until my next birthday
        """,
        """
        how old am I | how old I am
        what is my age | what my age is
        what's my age | what my age is
        which age do I have | which age I have
        how many years old am I | how many years old I am
        how many years have I lived | how many years I have lived
        what age am I | what age I am
        how old did I say I am | how old I said I am
        what did I say my age was | what I said my age was
        how old have I turned | how old I have turned
        """,
        """
        I am {v} now
        I turned {v} today
        today is my birthday and I am {v} now
        I am really {v} years old
        my age is {v} now
        """,
    ),
    _own(
        "pet", "animals", "your pet is {a}",
        """
        I have {a}
        I own {a}
        I keep {a} as a pet
        I have {a} at home
        I have {a} as a pet
        my pet is {a}
        my pet is called nothing special, it is just {a}
        the pet I have is {a}
        there is {a} living with me
        I share my home with {a}
        I adopted {a}
        I take care of {a}
        {a} lives with me
        {a} is my pet
        we have {a} at home
        my family has {a}
        I feed my {v} every morning
        """,
        """
        what pet do I have | what pet I have
        which pet do I have | which pet I have
        what kind of pet do I have | what kind of pet I have
        what is my pet | what my pet is
        what animal is my pet
        what kind of animal is my pet
        which animal is my pet
        which animal do I have at home | which animal I have at home
        what animal lives with me
        which animal do I own | which animal I own
        what animal do I keep | what animal I keep
        what animal do I take care of | what animal I take care of
        """,
        """
        now I have {a} instead
        my new pet is {a}
        I gave my pet away and got {a}
        my pet is {a} now
        I now have {a}
        I have {a} as a pet now
        """,
    ),
    _relative("pet_name", "pet", "pets"),
    _relative("sister", "sister", "women"),
    _relative("brother", "brother", "men"),
    _relative("friend", "best friend", "people"),
    _own(
        "car", "cars", "you drive a {v}",
        """
        I drive a {v}
        my car is a {v}
        I have a {v} car
        I own a {v}
        I bought a {v}
        the car I drive is a {v}
        the car I have is a {v}
        my car is made by {v}
        a {v} is what I drive
        I go to work in my {v}
        I go everywhere in my {v}
        there is a {v} in my garage
        in my garage there is a {v}
        I drive to work in a {v}
        a {v} is my car
        my family drives a {v}
        the brand of my car is {v}
        """,
        """
        what car do I drive | what car I drive
        which car do I drive | which car I drive
        what car do I have | what car I have
        what kind of car do I have | what kind of car I have
        what kind of car do I drive | what kind of car I drive
        what is my car | what my car is
        which car is mine
        which car do I own | which car I own
        what do I drive | what I drive
        what brand is my car
        what is the brand of my car | what the brand of my car is
        what is in my garage
        """,
        """
        I sold my car and bought a {v}
        I bought a new car, a {v}
        my new car is a {v}
        I now drive a {v}
        I drive a {v} now
        I replaced my car with a {v}
        """,
    ),
    _own(
        "birthday", "months", "your birthday is in {v}",
        """
        my birthday is in {v}
        I was born in {v}
        I was born in the month of {v}
        I have my birthday in {v}
        I celebrate my birthday in {v}
        my birthday comes in {v}
        my birthday falls in {v}
        {v} is the month of my birthday
        {v} is my birthday month
        {v} is when I have my birthday
        my birth month is {v}
        the month I was born in is {v}
        in {v} I have my birthday
        in {v} I get one year older
        I get one year older every {v}
        every {v} I celebrate my birthday
        """,
        """
        when is my birthday | when my birthday is
        in which month is my birthday | in which month my birthday is
        which month is my birthday in | which month my birthday is in
        what month is my birthday in | what month my birthday is in
        when do I have my birthday | when I have my birthday
        when do I celebrate my birthday | when I celebrate my birthday
        which month was I born in | which month I was born in
        in which month was I born | in which month I was born
        what is my birth month | what my birth month is
        when do I get one year older | when I get one year older
        what is my birthday month | what my birthday month is
        """,
        """
        my birthday is really in {v}
        my birthday is in {v}, not then
        my real birthday is in {v}
        I celebrate my birthday in {v} now
        """,
    ),
    _favourite("colour", "colour", "colours", "colours"),
    _favourite("food", "food", "foods", "foods"),
    _favourite("drink", "drink", "drinks", "drinks"),
    _favourite("sport", "sport", "sports", "sports"),
    _favourite("animal", "wild animal", "wild animals", "wild_animals"),
    _favourite("number", "number", "numbers", "numbers"),
    _favourite("season", "season", "seasons", "seasons"),
    _favourite("music", "music", "kinds of music", "music"),
    _own(
        "instrument", "instruments", "you play the {v}",
        """
        I play the {v}
        I can play the {v}
        I am learning to play the {v}
        I am learning the {v}
        my instrument is the {v}
        the instrument I play is the {v}
        {v} is my instrument
        {v} is the instrument I play
        I have been playing the {v} for years
        I practise the {v} every day
        I practice the {v} every evening
        I play the {v} in a band
        in the evening I play the {v}
        I take lessons on the {v}
        I make music on my {v}
        I started to play the {v} as a child
        """,
        """
        what instrument do I play | what instrument I play
        which instrument do I play | which instrument I play
        what is my instrument | what my instrument is
        what do I play in a band | what I play in a band
        which instrument am I learning | which instrument I am learning
        what instrument can I play | what instrument I can play
        which instrument do I practise | which instrument I practise
        what is the instrument I play | what the instrument I play is
        which musical instrument do I play | which musical instrument I play
        what instrument did I say I play | what instrument I said I play
        """,
        """
        now I play the {v} instead
        I now play the {v}
        my new instrument is the {v}
        I stopped that and play the {v} now
        I play the {v} now
        """,
    ),
    _own(
        "language", "languages", "your mother tongue is {v}",
        """
        my mother tongue is {v}
        my native language is {v}
        my first language is {v}
        my language is {v}
        I speak {v} at home
        I speak {v}
        at home we speak {v}
        my family speaks {v}
        the language I speak is {v}
        the language I speak at home is {v}
        {v} is my mother tongue
        {v} is my native language
        {v} is the language I speak
        {v} is the language of my family
        I grew up speaking {v}
        I learned {v} as a child
        with my parents I speak {v}
        """,
        """
        what is my mother tongue | what my mother tongue is
        what is my native language | what my native language is
        what is my first language | what my first language is
        what is my language | what my language is
        which language do I speak | which language I speak
        what language do I speak | what language I speak
        which language do I speak at home | which language I speak at home
        which language does my family speak | which language my family speaks
        what language do we speak at home | what language we speak at home
        which language did I grow up with | which language I grew up with
        which language is my mother tongue
        """,
        """
        my mother tongue is really {v}
        my real native language is {v}
        at home we speak {v} now
        I speak {v} at home now
        my first language is {v}, not that one
        """,
    ),
    _own(
        "country", "countries", "you want to visit {v}",
        """
        I want to visit {v}
        I would like to visit {v}
        I would love to visit {v}
        I want to travel to {v}
        I want to go to {v}
        I would love to go to {v} one day
        one day I will travel to {v}
        one day I want to see {v}
        I dream of visiting {v}
        I dream of a trip to {v}
        I am planning a trip to {v}
        I am saving money for a trip to {v}
        my dream is to visit {v}
        my dream country is {v}
        the country I want to visit is {v}
        {v} is the country I want to visit
        {v} is where I want to travel
        for my next holiday I want to go to {v}
        """,
        """
        which country do I want to visit | which country I want to visit
        what country do I want to visit | what country I want to visit
        where do I want to travel | where I want to travel
        where do I want to go | where I want to go
        which country do I want to travel to | which country I want to travel to
        which country would I like to visit | which country I would like to visit
        what is my dream country | what my dream country is
        which country do I dream of | which country I dream of
        where am I planning a trip to | where I am planning a trip to
        where would I love to go | where I would love to go
        which country would I love to see | which country I would love to see
        """,
        """
        now I want to visit {v} instead
        I would rather visit {v} now
        now I would like to travel to {v}
        my new dream is to visit {v}
        my trip will go to {v} instead
        """,
    ),
)  # fmt: skip
"""Every attribute, in a fixed order."""

_BY_KEY = {attribute.key: attribute for attribute in ATTRIBUTES}

# Two facts in one breath. {0} and {1} are the values, {a0} and {a1} with their articles.
_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("pet", "pet_name", "I have {a0} called {1}"),
    ("pet", "pet_name", "I have {a0} named {1}"),
    ("pet", "pet_name", "my pet is {a0} called {1}"),
    ("pet", "pet_name", "my {0} is called {1}"),
    ("pet", "pet_name", "{1} is my {0}"),
    ("name", "job", "I am {0} and I work as {a1}"),
    ("name", "job", "my name is {0} and I am {a1}"),
    ("name", "age", "I am {0}, {1} years old"),
    ("name", "city", "I am {0} and I live in {1}"),
    ("name", "city", "my name is {0}, I live in {1}"),
    ("name", "hometown", "I am {0} and I come from {1}"),
    ("city", "hometown", "I live in {0} but I was born in {1}"),
    ("hometown", "city", "I was born in {0} but now I live in {1}"),
    ("job", "city", "I work as {a0} in {1}"),
    ("sister", "brother", "I have a sister called {0} and a brother called {1}"),
    ("brother", "sister", "I have a brother called {0} and a sister called {1}"),
    ("food", "drink", "I like {0} and {1} most when I eat and drink"),
    ("food", "drink", "my favourite food is {0} and my favourite drink is {1}"),
    ("colour", "number", "my favourite colour is {0} and my favourite number is {1}"),
)

# {x} is the clause as it stands in a sentence, {X} the clause with a capital.
_TELL_FRAMES = _lines("""
{X}.
{X}.
{X}.
{X}!
Hello, {x}.
Hi, {x}.
Hey, {x}.
Hello! {X}.
Hi there! {X}.
By the way, {x}.
Well, {x}.
Oh, {x}.
So, {x}.
And {x}.
Also, {x}.
You should know that {x}.
I want you to know that {x}.
I wanted to tell you that {x}.
I can tell you that {x}.
Let me tell you that {x}.
Let me tell you something: {x}.
Just so you know, {x}.
For your information, {x}.
Here is something about me: {x}.
Something about me: {x}.
One more thing: {x}.
Please remember that {x}.
Remember this: {x}.
Keep in mind that {x}.
Do not forget that {x}.
Did you know that {x}?
Guess what, {x}.
{X}, you know.
{X}, by the way.
{X}, just so you know.
{X}, please remember that.
{X}. Can you remember that?
{X}. Please keep that in mind.
{X}. What do you think?
{X}. How about you?
{X} and I am happy about it.
I think I never told you that {x}.
To be honest, {x}.
As for me, {x}.
""")

_UPDATE_FRAMES = _lines("""
Actually, {x}.
Actually, {x}.
Sorry, I was wrong: {x}.
I was wrong, {x}.
I made a mistake, {x}.
I made a mistake before: {x}.
Correction: {x}.
I changed my mind, {x}.
I have changed my mind: {x}.
Forget what I said before, {x}.
Forget what I told you: {x}.
Things have changed: {x}.
Something has changed, {x}.
I have news: {x}.
Big news! {X}.
Oh wait, {x}.
No wait, {x}.
Sorry, {x}.
By the way, {x}.
{X}.
{X}.
Update: {x}.
Please note that {x}.
What I said before is no longer true: {x}.
It is different now, {x}.
Well, {x}.
""")

# {d} is the direct question, {D} with a capital, {i} the indirect one.
_ASK_FRAMES = _lines("""
{D}?
{D}?
{D}?
{D}?
{D}?
So, {d}?
Hey, {d}?
And {d}?
Well, {d}?
Tell me, {d}?
Please tell me, {d}?
Now tell me: {d}?
Quick question: {d}?
One question: {d}?
I have a question: {d}?
{D}, do you remember?
{D}, do you know?
{D} again?
{D}? I forgot.
{D}? Please tell me.
Do you remember {i}?
Do you still remember {i}?
Do you know {i}?
Do you still know {i}?
Can you tell me {i}?
Can you remember {i}?
Could you tell me {i}?
Can you remind me {i}?
Could you remind me {i}?
Would you tell me {i}?
Please tell me {i}.
Tell me {i}.
Tell me {i}, please.
Remind me {i}.
I forgot {i}.
I want to know {i}.
I would like to know {i}.
I wonder {i}.
Have you forgotten {i}?
Any idea {i}?
Did I tell you {i}?
Let me test you: {d}?
Let us see if you remember {i}.
""")

_SMALL_TALK = _lines("""
The weather is nice today.
It is raining outside.
It was a long day.
I am a bit tired.
I had a good day.
I just came home.
I am happy to talk to you.
It is nice to meet you.
How are you today?
This is fun.
I like talking to you.
That is interesting.
I see.
Okay.
Thank you.
Great.
Cool.
I slept well last night.
What a day!
It is getting late.
I have a lot of time today.
I am drinking something warm.
The sun is shining.
Let us talk a little.
""")

_ACKNOWLEDGE = ("Got it, {s}.", "Okay, {s}.", "I see, {s}.", "Thank you, {s}.")
_ACKNOWLEDGE_CHANGE = ("All right, {s} now.", "Okay, now {s}.")
_ACKNOWLEDGE_PLAIN = ("Thank you for telling me.", "I will remember that.")


def _article(value: str) -> str:
    return f"an {value}" if value[0].lower() in "aeiou" else f"a {value}"


def _fill(text: str, value: str) -> str:
    return text.replace("{a}", _article(value)).replace("{v}", value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _splits(count: int, salt: str) -> tuple[list[int], list[int]]:
    """Indices kept for training and held out, drawn from a fixed seed."""
    order = list(range(count))
    random.Random(f"{_SPLIT_SEED}/{salt}").shuffle(order)
    held_out = max(1, round(count * HELD_OUT_SHARE))
    return sorted(order[held_out:]), sorted(order[:held_out])


def _select(items: Sequence, split: str, salt: str) -> list:
    training, held_out = _splits(len(items), salt)
    return [items[index] for index in (training if split == "train" else held_out)]


def _select_distinct(items: Sequence[str], split: str, salt: str) -> list[str]:
    """As ``_select``, with repeated lines (repeated to be more frequent) kept on one side and in training."""
    repeated = [item for item in items if items.count(item) > 1]
    single = [item for item in items if items.count(item) == 1]
    chosen = _select(single, split, salt)
    return chosen + repeated if split == "train" else chosen


def attribute_named(key: str) -> Attribute:
    """The attribute with this key.

    Raises:
        ValueError: if there is none, naming those that exist.

    Example:
        >>> attribute_named("city").canonical
        'you live in {v}'
    """
    if key not in _BY_KEY:
        raise ValueError(f"attribute must be one of {', '.join(_BY_KEY)}; it was {key!r}.")
    return _BY_KEY[key]


class Wording:
    """Writes queries and answers about facts with one split of the grammar.

    Args:
        split: ``"train"`` or ``"held_out"``. The two never share a clause or a frame.

    Raises:
        ValueError: for any other split.

    Example:
        >>> import random
        >>> wording = Wording("train")
        >>> wording.answer("city", "Oslo")
        'You live in Oslo.'
        >>> "Oslo" in wording.tell(random.Random(1), [("city", "Oslo")])
        True
    """

    def __init__(self, split: str = "train") -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out'; it was {split!r}.")
        self.split = split
        self.tells = {a.key: _select(a.tells, split, f"{a.group}/tell") for a in ATTRIBUTES}
        self.asks = {a.key: _select(a.asks, split, f"{a.group}/ask") for a in ATTRIBUTES}
        self.updates = {a.key: _select(a.updates, split, f"{a.group}/update") for a in ATTRIBUTES}
        self.pairs = _select(_PAIRS, split, "pairs")
        self.tell_frames = _select_distinct(_TELL_FRAMES, split, "tell frames")
        self.update_frames = _select_distinct(_UPDATE_FRAMES, split, "update frames")
        self.ask_frames = _select_distinct(_ASK_FRAMES, split, "ask frames")
        self.small_talk = _select(_SMALL_TALK, split, "small talk")

    def tell(self, rng: random.Random, facts: Sequence[tuple[str, str]]) -> str:
        """One message that states these (attribute, value) facts, in this order."""
        clauses = []
        rest = list(facts)
        while rest:
            pairs = [p for p in self.pairs if len(rest) > 1 and (p[0], p[1]) == (rest[0][0], rest[1][0])]
            if pairs and rng.random() < 0.7:
                (_, first), (_, second) = rest[:2]
                text = rng.choice(pairs)[2]
                text = text.replace("{a0}", _article(first)).replace("{a1}", _article(second))
                clauses.append(text.replace("{0}", first).replace("{1}", second))
                rest = rest[2:]
            else:
                key, value = rest.pop(0)
                clauses.append(_fill(rng.choice(self.tells[key]), value))
        joiner = rng.choice((" and ", ", and ", ". ", ", "))
        text = clauses[0]
        for clause in clauses[1:]:
            text += joiner + (_capital(clause) if joiner == ". " else clause)
        return self._dress(rng, self._frame(rng.choice(self.tell_frames), text))

    def update(self, rng: random.Random, key: str, value: str) -> str:
        """One message that replaces the value of an attribute."""
        if rng.random() < 0.5:
            clause = _fill(rng.choice(self.updates[key]), value)
            plain = rng.random() < 0.5
        else:
            clause, plain = _fill(rng.choice(self.tells[key]), value), False
        frame = "{X}." if plain else rng.choice(self.update_frames)
        return self._dress(rng, self._frame(frame, clause))

    def ask(self, rng: random.Random, key: str) -> str:
        """One message that asks for an attribute."""
        direct, indirect = rng.choice(self.asks[key])
        frame = rng.choice(self.ask_frames)
        text = frame.replace("{d}", direct).replace("{D}", _capital(direct)).replace("{i}", indirect)
        return self._dress(rng, text)

    def answer(self, key: str, value: str) -> str:
        """The assistant's answer to a question about a known fact."""
        return _capital(_fill(_BY_KEY[key].canonical, value)) + "."

    def acknowledge(self, rng: random.Random, facts: Sequence[tuple[str, str]], changed: bool = False) -> str:
        """The assistant's answer to a statement: mostly it says the facts back."""
        if rng.random() < 0.12:
            return rng.choice(_ACKNOWLEDGE_PLAIN)
        if len(facts) == 1 and facts[0][0] == "name" and not changed and rng.random() < 0.7:
            return f"Nice to meet you, {facts[0][1]}!"
        statement = " and ".join(_fill(_BY_KEY[key].canonical, value) for key, value in facts)
        return rng.choice(_ACKNOWLEDGE_CHANGE if changed else _ACKNOWLEDGE).replace("{s}", statement)

    @staticmethod
    def _frame(frame: str, clause: str) -> str:
        # A clause that begins with a lower-case value or article still needs its capital at the start of a sentence.
        return frame.replace("{x}", clause).replace("{X}", _capital(clause))

    def _dress(self, rng: random.Random, text: str) -> str:
        """Small talk around the message and the sloppiness of real typing."""
        draw = rng.random()
        if draw < 0.12:
            text = f"{rng.choice(self.small_talk)} {text}"
        elif draw < 0.18:
            text = f"{text} {rng.choice(self.small_talk)}"
        if rng.random() < 0.15:
            text = text.rstrip(".?!")
        if rng.random() < 0.15 and not text.startswith(("I ", "I'")):
            text = text[:1].lower() + text[1:] if not _starts_with_value(text) else text
        if rng.random() < 0.08:
            text = re.sub(r"\bI\b", "i", text)
        return text


_CAPITAL_VALUES = {value.split()[0] for values in VALUES.values() for value in values if value[0].isupper()}


def _starts_with_value(text: str) -> bool:
    return re.split(r"[\s,.!?]", text, maxsplit=1)[0] in _CAPITAL_VALUES


_VALUE_PATTERNS: dict[str, re.Pattern[str]] = {}


def values_in_answer(key: str, text: str) -> set[str]:
    """All values of an attribute that occur in a text as whole words, longest match first.

    Example:
        >>> values_in_answer("country", "You want to visit New Zealand.")
        {'New Zealand'}
    """
    pattern = _VALUE_PATTERNS.get(key)
    if pattern is None:
        values = sorted(attribute_named(key).values, key=lambda value: (-len(value), value))
        pattern = _VALUE_PATTERNS[key] = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, values)) + r")(?!\w)")
    return set(pattern.findall(text))
