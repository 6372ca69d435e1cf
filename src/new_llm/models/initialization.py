"""Every initialisation of the project, in one table.

| parameter | initial value |
|---|---|
| weights of linear layers, embedding, head | normal(0, initializer_range), as GPT-NeoX |
| biases | 0 |
| LayerNorm, RMSNorm | weight 1, bias 0 |
| memory gate β | gate_init (set by the layer) |
| W_q, W_k of a memory layer | as drawn, times query_key_init_scale; with match_query_key_init W_k = W_q |
| its biases of q and k | query_key_init_bias |
| bank weights | 0: all banks weigh the same (set by the layer) |
| a convolution of s tokens | uniform(−1/√s, 1/√s) |
| decay of Gated DeltaNet | exp(A) uniform in 1 … 16, softplus(b) log-uniform in 0.001 … 0.1 |
"""

from torch import nn

from new_llm.models.layers import Attention


def initialize_weights(model: nn.Module, initializer_range: float) -> None:
    """Draw the weights of a model, in the order of its modules, from torch's global generator.

    With the same seed, models that differ only in parameters that are not drawn (gates) get the same weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Attention):
            module.initialize_features()
