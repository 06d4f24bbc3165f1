"""Reranking on TensorRT-LLM: the same requests, prompts read and answers decoded elsewhere.

Data flow of one prompt::

    pages -> embeddings (vision engine) -> inputs -> calls -> runner -> tokens -> writing -> order
      \\-> images (LLM API) --------------------------^

``inputs`` makes what the decoder engine is fed, ``calls`` the keywords of every call, ``runner`` is
the one module that imports ``tensorrt_llm``, ``writing`` makes answers of its calls and
``answering`` results of those. All of it is tested against a stand-in for the package that has the
signatures of its sources and computes with our own engine. Nothing of it was ever run with
TensorRT-LLM itself, which could not be had, and the session for the vision engine was never run.

What becomes of the options of a request:

================================ ==================================================================
option                           on TensorRT-LLM
================================ ==================================================================
top_k, plan (but ``cascade``),   as ever: they are about prompts and orders
window, stride, anchors, layout,
min_pixels, max_pixels, samples
max_new_tokens                   as ever
temperature, seed                TensorRT-LLM draws: repeatable there, other draws than ours
stop="eos", "tag"                as ever; the answer is cut at the same token
stop="determined"                ends at the tag: same order, nothing saved; ``stop_reason`` says so
think="full", "off", a number    as ever; forced text is part of the prompt of a call
think="auto"                     refused: it needs the probabilities of first choices
constrain=True                   not masked: ``status`` is ``ok`` only for a list that the mask
                                 would have let pass as it is, and otherwise ``repaired``
deadline_ms, draft, plan=        refused: they need single steps, logits or our own keys and values
"cascade", image_kv="relocate"
================================ ==================================================================

Every result is called ``approximate``: no result of it was compared with ours, and TensorRT-LLM
shares blocks of keys and values between prompts, which may change last bits. ``list_logprob`` is
empty, and the reasoning of a stream comes as a whole. Options of ``Reranker.load`` that say how our
own engine computes (dtype, kernels, prefill, kv, graphs) are refused, as is ``concurrency``.
"""
