"""The chat client: thinking told from answer, figures from usage, history, errors, and keys in a real process."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from chat_server import CUT, END, ChatServer, said, usage
from fake_server import serving

from specdec.chat.client import ChatError
from specdec.chat.session import ChatOptions, run_chat
from specdec.chat.thinking import ANSWER, WAS_THINKING, Piece, ThinkSplitter

CHAT = [sys.executable, "-m", "specdec", "chat"]
REPLY = [said(""), said("<thi"), said("nk>\nhm</th"), said("ink>\n\nIt is"), said(" 4.", "stop"), usage(9, 4, 6)]
ENDLESS = [said("One"), *[event for i in range(100) for event in (0.1, said(f" {i}"))]]


# -- thinking and answer


def split(text: str, at: tuple[int, ...], opens_think: bool | None, patient: bool = False) -> ThinkSplitter:
    splitter = ThinkSplitter(opens_think, patient)
    shown = {"thinking": "", "answer": "", WAS_THINKING: ""}
    for start, end in zip((0, *at), (*at, len(text)), strict=True):
        for kind, piece in splitter.take("", text[start:end]):
            shown[kind] += piece
            shown = {**shown, "thinking": shown["answer"], "answer": ""} if kind == WAS_THINKING else shown
    for kind, piece in splitter.finish():
        shown[kind] += piece
    assert (shown["thinking"], shown["answer"]) == (splitter.thinking, splitter.answer), "shown is what is kept"
    return splitter


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize(
    ("text", "opens_think", "thinking", "answer"),
    [
        ("\n<think>hm </thin</think>\n4", False, "hm </thin", "\n4"),
        ("<think>hm</think>4 </think> 5", None, "hm", "4 </think> 5"),
        ("hm < 3</think>\n4", True, "hm < 3", "\n4"),
        ("<think>hm</think>4", True, "hm", "4"),
        ("hm\n</think>\n4", None, "hm\n", "\n4"),
        ("a <think> or </think>", False, "", "a <think> or </think>"),
        ("4 < 5 </thi", None, "", "4 < 5 </thi"),
        ("never closed </th", True, "never closed </th", ""),
    ],
)
def test_tags_are_found_wherever_the_chunks_are_cut(text, opens_think, thinking, answer, patient):
    cuts = [(), tuple(range(1, len(text))), *[(i,) for i in range(1, len(text))]]
    for at in cuts:
        splitter = split(text, at, opens_think, patient)
        assert (splitter.thinking, splitter.answer) == (thinking, answer), at


def test_text_of_an_unknown_kind_waits_only_where_patience_is_asked_for():
    assert ThinkSplitter(None, patient=True).take("", "hm") == []
    assert ThinkSplitter(False, patient=True).take("", "hm") == [Piece(ANSWER, "hm")]
    hasty = ThinkSplitter(None)
    assert hasty.take("", "hm") == [Piece(ANSWER, "hm")]
    assert hasty.take("", "</think>4") == [Piece(WAS_THINKING, ""), Piece(ANSWER, "4")]


def test_what_the_server_calls_reasoning_is_thinking_and_tags_are_text():
    splitter = ThinkSplitter(True)
    splitter.take("hm", "")
    assert splitter.take("", "4 </think> 5") == [Piece(ANSWER, "4 </think> 5")]
    assert (splitter.thinking, splitter.answer) == ("hm", "4 </think> 5")


# -- a chat without a terminal


@pytest.fixture
def chat(monkeypatch, capsys):
    def run(server: ChatServer, lines: str, **options) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with serving(server):
            run_chat(ChatOptions(url=server.url, **options))
        return capsys.readouterr()

    return run


def test_the_answer_goes_to_stdout_and_everything_else_to_stderr(chat):
    out, err = chat(ChatServer(REPLY), "2+2?\n\n2+2?\n/quit\nnever asked\n")
    assert out == "It is 4.\nIt is 4.\n"
    thinking, figures, *_ = err.splitlines()
    assert thinking == "hm"
    assert figures.startswith("9 tokens · ") and figures.endswith(" · τ 2.50")
    assert all(f" {unit}" in figures for unit in ("tokens/s", "TTFT 0", "thinking 0"))


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_of_the_servers_parser_is_kept_off_stdout(chat, field):
    out, err = chat(ChatServer([said(**{field: "hm"}), said("4"), said("", "stop"), usage(3)]), "2+2?\n")
    assert (out, err.splitlines()[0]) == ("4\n", "hm")


@pytest.mark.parametrize("prompt_end", [None, "<|Assistant|><think>\n"])
def test_a_reply_that_starts_inside_its_thinking_leaves_it_off_stdout(chat, prompt_end):
    server = ChatServer([said("hm"), said("\n</think>\n\n4", "stop"), usage(3)])
    server.prompt_end = prompt_end
    out, err = chat(server, "2+2?\n")
    assert (out, err.splitlines()[0]) == ("4\n", "hm")


def test_tau_is_the_servers_where_the_reply_has_none_and_left_out_where_nobody_has(chat):
    server = ChatServer([said("4", "length"), usage(5)])
    server.status = {"acceptance_length": 1.875}
    assert chat(server, "2+2?\n")[1].splitlines()[0].endswith("τ 1.88 (of the server) · cut off at the length limit")
    server = ChatServer([said("4", "stop")])
    assert chat(server, "2+2?\n")[1].startswith("TTFT "), "no tokens without usage, and no τ"


def test_speed_and_times_come_from_clock_and_usage(chat):
    script = [said(""), 0.2, said("<think>hm"), 0.3, said("</think>4", "stop"), usage(50)]
    figures = chat(ChatServer(script), "2+2?\n")[1].splitlines()[1]
    tokens, rate, ttft, thinking = map(float, re.findall(r"[\d.]+", figures))
    assert tokens == 50 and 0.2 <= ttft < 5 and 0.3 <= thinking < 5
    assert rate == pytest.approx(50 / (ttft + thinking), rel=0.2)


def test_history_holds_answers_without_thinking_and_starts_over(chat):
    server = ChatServer(REPLY)
    chat(server, "one\ntwo\n/new\nthree\n", system="Be brief.", temperature=0.5, max_tokens=7, model="given")
    system, one = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}
    answer = {"role": "assistant", "content": "\n\nIt is 4."}  # as the server sent it: its own prefix cache knows it
    assert [body["messages"] for body in server.bodies] == [
        [system, one],
        [system, one, answer, {"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
    ]
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("given", 0.5, 7)
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}


def test_a_turn_without_an_answer_is_not_kept_and_nothing_unasked_is_sent(chat):
    server = ChatServer([said("<think>hm", "length"), usage(2)], REPLY)
    out, err = chat(server, "one\ntwo\n/nonsense\n")
    assert out == "It is 4.\n" and "left out" in err and "unknown command /nonsense: /new" in err
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["two"]
    assert server.bodies[0]["model"] == "scripted"
    assert not {"temperature", "max_tokens"} & set(server.bodies[0]) and server.keys == [None, None]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, {"error": {"message": "context is\n4096 tokens", "code": 400}}, "says 400: context is 4096 tokens"),
        (404, {"message": "no such model"}, "says 404: no such model"),
        (401, {"error": "Unauthorized"}, "says 401: Unauthorized; pass --api-key"),
        (503, "overloaded", "says 503: overloaded"),
    ],
)
def test_a_refusal_is_the_servers_own_words(chat, status, body, words):
    server = ChatServer(REPLY)
    server.refusal = (status, body)
    with pytest.raises(ChatError, match=words):
        chat(server, "2+2?\n")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([said("It"), CUT], "cut before the answer was complete"),
        ([said("It"), END], "cut before the answer was complete"),
        ([said("It"), {"error": {"message": "engine died"}}], "broke off: engine died"),
        ([said("It"), "<html>"], "something else than a chat completion"),
        ([said("It"), {"choices": [], "usage": {"total_tokens": 3}}], "something else than a chat completion"),
    ],
)
def test_a_broken_stream_shows_what_came_and_says_why(chat, capsys, script, words):
    with pytest.raises(ChatError, match=words):
        chat(ChatServer(script), "2+2?\n")
    assert capsys.readouterr().out == "It\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:8000", "http://[half"])
def test_a_server_that_is_not_there(url):
    with pytest.raises(ChatError, match=r"is it running|is no URL"):
        run_chat(ChatOptions(url=url))


# -- the command


def environment(**more: str) -> dict[str, str]:
    return {**{key: os.environ[key] for key in os.environ if key not in ("OPENAI_API_KEY", "NO_COLOR")}, **more}


def test_the_command_pipes_an_answer_and_sends_the_key():
    server = ChatServer(REPLY)
    with serving(server):
        done = subprocess.run(
            [*CHAT, "--url", f"{server.url}/v1"], input="2+2?\n", capture_output=True, text=True, timeout=60,
            env=environment(OPENAI_API_KEY="secret"),
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "It is 4.\n")
    assert server.keys == ["Bearer secret"] and "secret" not in done.stderr


def test_the_command_ends_in_one_line_without_a_server():
    done = subprocess.run([*CHAT, "--url", "http://127.0.0.1:1"], input="", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no answer from http://127.0.0.1:1") and done.stderr.count("\n") == 1


def test_ctrl_c_stops_the_answer_and_not_the_program():
    server = ChatServer(ENDLESS, REPLY)
    server.prompt_end = "<|Assistant|>"  # the answer is shown as it comes
    with serving(server):
        process = subprocess.Popen(
            [*CHAT, "--url", server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment(),
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("count\n2+2?\n")
        process.stdin.flush()
        assert process.stdout.read(3) == "One"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert server.client_left.wait(10), "the server may stop working on it"
    assert process.returncode == 0 and "stopped" in err and "Traceback" not in err
    assert out.endswith("It is 4.\n")
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


class Terminal:
    """What a person at a terminal sees and types."""

    def __init__(self, process: subprocess.Popen, fd: int) -> None:
        self.process, self._fd, self.seen = process, fd, ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def end_with(self, key: str) -> None:
        """Type ``key`` until the program ends: Python's input() misses one that comes in the moment it begins."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            self.type(key)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)

    def read_until(self, text: str, timeout_sec: float = 30) -> str:
        """What appeared since the last call, up to and including ``text``."""
        deadline = time.monotonic() + timeout_sec
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._fd], [], [], 0.1)[0]:
                self.seen += os.read(self._fd, 4096).decode(errors="replace")
        before, found, self.seen = self.seen.partition(text)
        return before + found


@contextmanager
def terminal(server: ChatServer, *options: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    with serving(server):
        process = subprocess.Popen(
            [*CHAT, "--url", server.url, *options], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
            start_new_session=True, env=environment(TERM="xterm"), preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(theirs)
        try:
            yield Terminal(process, ours)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def own_terminal() -> None:
    """In the child: make its standard input the terminal whose keys signal it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_in_a_terminal_thinking_is_dim_ctrl_c_stops_an_answer_and_then_ends():
    server = ChatServer([*REPLY[:3], said("ink>\n\nIt \x1b]0;title\x07is"), *REPLY[4:]], ENDLESS)
    with terminal(server) as person:
        assert "scripted at" in person.read_until("> ")
        person.type("2+2?\n")
        shown = person.read_until("\x1b[2m9 tokens")
        assert re.search("\x1b]0;[0-9]+ tokens/s\x07", shown), "the title shows the speed while tokens come"
        assert "\x1b[2mhm" in shown and "It ]0;titleis 4." in shown.replace("\x1b[0m", "")
        person.read_until("> ")
        person.type("count\n")
        person.read_until("One 0")
        person.type("\x03")
        person.read_until("stopped")
        person.read_until("> ")
        person.end_with("\x03")


def test_in_a_terminal_without_color_words_tell_thinking_and_ctrl_d_ends():
    server = ChatServer(REPLY)
    server.refusal = (400, {"error": {"message": "too long"}})
    with terminal(server, "--no-color") as person:
        person.read_until("> ")
        person.type("/help\n")
        person.read_until("starts over")
        person.type("2+2?\n")
        person.read_until("error: the server says 400: too long")
        server.refusal = None
        person.read_until("> ")
        person.type("2+2?\n")
        shown = person.read_until("tokens/s").replace("\r\n", "\n")
        assert "[thinking]\nhm\n[answer]\nIt is 4.\n9 tokens" in shown and "\x1b[2m" not in shown
        person.read_until("> ")
        person.end_with("\x04")
