"""A prompt that is saved in ComfyUI is read by the command line, and makes the video that its caption makes."""

import torch

from flowcache_core.command_generate import read_embedding
from flowcache_core.demo import embed_caption
from tests.helpers.host.graph import Graph


def test_what_is_saved_is_the_caption(server):
    graph = Graph()
    caption = graph.add("FlowCacheDemoPrompt", caption="a red circle")
    node = graph.add("FlowCacheSaveEmbedding", conditioning=(caption, 0), filename_prefix="circle")
    outcome = server.run(graph)
    assert outcome.error is None
    (file,) = server.saved(outcome, node)
    assert file.parent.name == "flowcache_embeddings" and "8 tokens of width 64" in outcome.outputs[node]["text"][0]
    embedding, mask = read_embedding(file)
    assert torch.equal(embedding, embed_caption("a red circle")) and mask is None


def test_several_prompts_are_refused(server):
    graph = Graph()
    captions = [graph.add("FlowCacheDemoPrompt", caption=words) for words in ("a red circle", "a blue square")]
    both = graph.add("ConditioningCombine", conditioning_1=(captions[0], 0), conditioning_2=(captions[1], 0))
    graph.add("FlowCacheSaveEmbedding", conditioning=(both, 0), filename_prefix="both")
    assert "2 prompts in the conditioning, expected 1" in server.run(graph).error["exception_message"]
