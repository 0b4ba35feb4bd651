"""A measurement that ends early: what was measured is kept, and the same command goes on."""

from __future__ import annotations

import os
import signal

import pytest
from evaluation_runs import run, settings
from fake_server import FakeServer, serving

from specdec.evaluation.measure import WARMUP_PROMPT
from specdec.evaluation.run import evaluate

pytestmark = pytest.mark.usefixtures("quick")


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(tmp_path):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)
    spec.on_chat = lambda number: number == 9 and os.kill(os.getpid(), signal.SIGINT)
    config = settings(tmp_path, {"plain": plain, "spec": spec})
    with serving(plain, spec):
        result = evaluate(config, None, tmp_path / "out")
        assert result["interrupted"] and 4 <= result["summary"]["num_requests"] < 32
        assert result["summary"]["acceptance_length"] == pytest.approx(3.0)
        assert "interrupted" in (tmp_path / "out" / "report.html").read_text()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        before = len(plain.log)
        config.eval.seed = 1
        with pytest.raises(ValueError, match="other settings"):
            evaluate(config, None, tmp_path / "out")
        config.eval.seed = 0
        config.target.dtype = "float32"
        with pytest.raises(ValueError, match="other settings"):
            evaluate(config, None, tmp_path / "out")
        config.target.dtype = "auto"
        whole = evaluate(config, None, tmp_path / "out")
    assert not whole["interrupted"] and whole["summary"]["num_requests"] == 32
    measured = [body for body in plain.log[before:] if body["max_tokens"] == config.eval.max_new_tokens]
    assert len(measured) < 24  # what was there was not measured again


def test_ctrl_c_in_the_warm_up_says_that_nothing_was_measured(tmp_path):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)
    plain.on_chat = lambda number: number == 2 and os.kill(os.getpid(), signal.SIGINT)
    result = run(plain, spec, tmp_path)
    assert result["interrupted"] and result["requests"] == [] and result["summary"]["speedup_median"] is None
    assert "Nothing to conclude" in (tmp_path / "out" / "summary.md").read_text()


def test_ctrl_c_in_the_two_sample_test_keeps_the_measurement(tmp_path):
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    config = settings(tmp_path, {"plain": plain, "spec": spec}, sampled=False, repeats=1)
    config.eval.distribution_samples, config.eval.distribution_prompts = 20, 2
    spec.on_chat = lambda number: number == 25 and os.kill(os.getpid(), signal.SIGINT)  # 18 belong to the measurement
    with serving(plain, spec):
        result = evaluate(config, None, tmp_path / "out")
        assert result["interrupted"] and result["summary"]["num_requests"] == 16
        assert result["losslessness"]["greedy"] and result["losslessness"]["distribution"] == []
        whole = evaluate(config, None, tmp_path / "out")
    assert not whole["interrupted"] and whole["requests"] == result["requests"]
    assert whole["losslessness"]["distribution"][0]["num_samples"] == 20


def test_a_run_that_ends_while_grading_is_not_measured_again(tmp_path, monkeypatch):
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    config = settings(tmp_path, {"plain": plain, "spec": spec}, sampled=False, repeats=1)

    def killed(*_) -> None:
        raise KeyboardInterrupt

    with serving(plain, spec):
        with monkeypatch.context() as patch:
            patch.setattr("specdec.evaluation.run._grade", killed)
            with pytest.raises(KeyboardInterrupt):
                evaluate(config, None, tmp_path / "out")
        before = len(plain.log)
        result = evaluate(config, None, tmp_path / "out")
    assert {body["messages"][0]["content"] for body in plain.log[before:]} == {WARMUP_PROMPT}
    assert result["summary"]["num_requests"] == 16 and not list((tmp_path / "out").glob("journal*"))
