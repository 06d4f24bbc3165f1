"""One decode step on a GPU: a few tokens for a few sequences, as one graph.

Data flow of a step, all of it behind :meth:`mmr5_runtime.engine.Engine.step`::

    token ids, positions, arenas
      -> bucket    (buckets)  sizes are rounded up, so that few graphs serve all
      -> inputs    (inputs)   ids, positions and the table of sequences in one fixed buffer
      -> graph     (graphs)   recorded once per bucket, replayed over that buffer
           embedding
           -> per layer       (fused)
                norm + qkv -> rotate and append to the arenas -> attention -> o + residual
                norm + gate, up -> silu(gate) * up -> down + residual
           -> norm + head
      -> logits    (stepper)  the asked rows, in fp32, in memory of the caller's own

Where a sequence lies and how long it is are read on the device, from the table; the host decides
nothing but the bucket. A row's numbers do not depend on the bucket: the kernels compute every row
alike however many there are, and cut keys into chunks of a fixed size. So steps of one token and of
eight, alone and in company, give the same bits. A linear stored in a format that has no such kernel
(int8 in groups, scales in fp16 or fp32) runs in torch instead, which promises none of this.
"""
