import torch

from pathfm.models.layers import Block
from tests.features.small import patch_backbone


def test_attention_weights_sum_to_1_and_reproduce_the_blocks_attention():
    torch.manual_seed(0)
    block = Block(24, 3, layerscale=0.3)
    tokens = torch.randn(2, 5, 24)
    weights = block.attention_weights(tokens)
    assert weights.shape == (2, 3, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    packed = tokens.flatten(0, 1)
    value = block.attn.qkv(block.norm1(packed))[:, 48:].unflatten(1, (3, 8)).unflatten(0, (2, 5)).transpose(1, 2)
    attended = packed + block.ls1(block.attn.proj((weights @ value).transpose(1, 2).reshape(10, 24)))
    expected = attended + block.ls2(block.mlp(block.norm2(attended)))
    found = block(packed, ((2, 5),), "sdpa")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_last_attention_of_a_vit_is_that_of_its_last_block_on_what_the_others_give():
    vit = patch_backbone()
    images = torch.randn(2, 3, 32, 32)
    before_last = vit.intermediate_layers(images, [len(vit.blocks) - 2], norm=False)[0].prenorm
    weights = vit.last_attention(images)
    assert weights.shape == (2, 3, 5, 5)
    torch.testing.assert_close(weights, vit.blocks[-1].attention_weights(before_last))
