"""The table that makes vLLM capture graphs of every K."""

import pytest

from serving.graphs import with_every_width

TABLE = "num_speculative_tokens_per_batch_size"


@pytest.mark.parametrize("widest", [1, 3, 7])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 4, 16, 256])
def test_vllm_reads_every_k_from_the_table_where_there_are_sizes_for_all(widest, max_num_seqs):
    utils = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils")
    table = with_every_width({"method": "eagle3", "num_speculative_tokens": widest}, max_num_seqs)[TABLE]
    lookup = utils.build_dynamic_sd_schedule_lookup(table, max_num_seqs, widest)[1:]
    named = set(range(min(widest, max_num_seqs - 1))) | {widest}
    assert set(lookup) == named
    widest_batch = {width: batch for batch, width in enumerate(lookup, start=1)}
    assert min(widest_batch.values()) >= max_num_seqs - widest, "graphs reach nearly as far as the batch"
    if max_num_seqs > 1:
        assert widest_batch[0] == max_num_seqs


@pytest.mark.parametrize("speculative", [{"method": "medusa"}, {"method": "ngram"}, {"parallel_drafting": True}])
def test_what_drafts_on_the_older_runner_keeps_its_graphs(speculative):
    given = {"method": "eagle3", "num_speculative_tokens": 3, **speculative}
    assert with_every_width(given, 16) == given
