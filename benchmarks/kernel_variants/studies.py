"""Which variants every study of the Triton kernels measures."""

import dataclasses

from benchmarks.kernel_variants.cases import Case, Variant


def studies() -> dict[str, list[tuple[Case, list[Variant]]]]:
    """The variants of every study, in the order they are measured."""
    dense = [Variant(op="dense"), Variant(op="dense", store="token_major")]
    plain = Variant()
    wide = Variant(block_tokens=256, num_warps=8)
    vary = dataclasses.replace
    square = Case(4096, 4096, 4096)
    layout = [
        vary(plain, values="vk"),
        plain,
        vary(plain, prefetch=True),
        vary(plain, values="vk", prefetch=True),
        vary(plain, bounds="dynamic"),
        vary(plain, bounds="dynamic", prefetch=True),
        vary(plain, bounds="dynamic", tail="mask"),
        vary(plain, bounds="dynamic", tail="mask", prefetch=True),
        vary(plain, flip=True, prefetch=True),
        vary(plain, flip=True, prefetch=True, store="token_major"),
        vary(plain, prefetch=True, store="token_major"),
        vary(plain, prefetch=True, order="tokens"),
        vary(plain, prefetch=True, evict="evict_last"),
    ]
    tiles = [
        vary(base, prefetch=prefetch, block_k=bk, num_stages=stages, num_warps=warps, values=values)
        for base, warp_choices in ((plain, (4, 8)), (wide, (8, 4)))
        for warps in warp_choices
        for bk, stage_choices in ((32, (4, 6)), (64, (3, 4)), (128, (2, 3)))
        for stages in stage_choices
        for prefetch, values in ((True, "pv"), (False, "pv"), (True, "vk"))
    ]
    small = Variant(block_rows=64, block_tokens=128)
    v64 = [
        vary(small, block_tokens=bn, num_warps=warps, prefetch=prefetch, block_k=bk, num_stages=stages)
        for bn, warps in ((128, 4), (256, 4), (256, 8))
        for bk, stages in ((32, 5), (64, 3), (64, 4), (128, 3))
        for prefetch in (True, False)
    ]
    backward = [
        *[vary(plain, op="grad_values", block_rows=br, block_k=bk, num_stages=s, num_warps=w)
          for br, w in ((128, 4), (128, 8), (256, 8)) for bk, s in ((64, 3), (64, 4), (128, 3))],
        *[vary(plain, op="grad_input", prefetch=prefetch, block_tokens=bn, num_warps=w, num_stages=s, block_k=bk)
          for prefetch in (True, False) for bn, w in ((128, 4), (256, 8)) for bk, s in ((64, 3), (64, 4), (128, 3))],
        vary(plain, op="grad_input_xla"),
        vary(plain, op="grad_input_decompress", num_stages=1, block_rows=64),
        vary(plain, op="grad_input_decompress", num_stages=1, block_rows=128, num_warps=8),
    ]  # fmt: skip

    def decode(n, split_v=(16, 32, 64, 128)):
        out = []
        for br in split_v:
            for bk, stages in ((64, 4), (128, 3), (128, 5), (256, 2)):
                for split in (1, 2, 4):
                    if br <= 32 and split > 1:
                        continue
                    warps = (4,) if n < 64 else (4, 8) if br == 128 else (4,)
                    for w in warps:
                        bn = max(16, min(n, 128))
                        out.append(
                            Variant(block_rows=br, block_tokens=bn, block_k=bk, num_stages=stages, num_warps=w,
                                    split=split, prefetch=True)
                        )  # fmt: skip
        return out

    vectors = [
        Variant(op="vector", block_rows=br, block_k=bk, num_warps=w, num_stages=1)
        for br in (32, 64, 128)
        for bk in (32, 64, 128)
        for w in (2, 4, 8)
        if br * bk // (32 * w) <= 128
    ]
    decode2 = [
        Variant(block_rows=br, block_tokens=16, block_k=bk, num_stages=s, num_warps=w, prefetch=True, ahead=ahead,
                split=split)
        for br, warps in ((16, (1, 2)), (32, (1, 2, 4)), (64, (4, 8)))
        for w in warps
        for bk, stage_choices in ((32, (6, 10)), (64, (3, 5, 8)), (128, (2, 3, 4, 6)), (256, (2, 3)))
        for s in stage_choices
        for ahead in (1, 2)
        for split in (1, 2)
        if br * bk * s * 2 <= 96 * 1024 and not (split > 1 and br < 64)
    ]  # fmt: skip
    mlp = Case(14336, 4096, 16)
    occupancy = [
        vary(plain, block_k=bk, num_stages=stages, prefetch=prefetch, unroll=unroll, ahead=ahead)
        for bk, stage_choices in ((16, (4, 6, 8)), (32, (2, 3, 4, 5, 6, 7, 8)), (64, (2, 3, 4, 5)))
        for stages in stage_choices
        for prefetch, ahead in ((False, 1), (True, 1), (True, 2))
        for unroll in (1, 2)
    ]
    occupancy += [vary(plain, block_k=bk, num_stages=stages, ids="none") for bk in (32, 64) for stages in (2, 3, 4)]
    occupancy += [
        vary(wide, block_k=bk, num_stages=stages, prefetch=True, unroll=unroll, ahead=ahead)
        for bk, stages in ((32, 3), (32, 5), (64, 2), (64, 3))
        for unroll in (1, 2)
        for ahead in (1, 2)
    ]
    best = [
        vary(plain, block_k=32, num_stages=5),
        vary(plain, block_k=32, num_stages=6),
        vary(plain, block_k=32, num_stages=7),
        vary(plain, block_k=64, num_stages=2, prefetch=True),
        vary(plain, block_k=64, num_stages=3, prefetch=True),
        vary(plain, block_k=64, num_stages=3, prefetch=True, ahead=2),
        vary(plain, block_k=64, num_stages=3, prefetch=True, unroll=2, ahead=2),
        vary(plain, block_k=32, num_stages=3, prefetch=True),
        vary(plain, block_k=32, num_stages=3, prefetch=True, unroll=2, ahead=2),
    ]
    ragged = [vary(b, bounds="dynamic") for b in best]
    ragged += [vary(b, bounds="dynamic", order="tokens") for b in best]
    narrow = [
        vary(small, block_tokens=bn, num_warps=w, prefetch=prefetch, block_k=bk, num_stages=stages, unroll=unroll)
        for bn, w in ((128, 2), (128, 4), (256, 4))
        for bk, stage_choices in ((16, (5, 7)), (32, (2, 3, 4, 5, 6, 7)), (64, (2, 3, 5)))
        for stages in stage_choices
        for prefetch, unroll in ((False, 1), (True, 1), (True, 2))
    ]
    tokens = [
        vary(plain, op="token_major", block_k=64, num_stages=3, prefetch=True, transpose=t)
        for t in ("xla", "triton", "triton32", "triton128", "triton128x64")
    ]
    touched = [
        vary(plain, block_k=bk, num_stages=stages, prefetch=True, touch=touch, early_rows=early)
        for bk, stage_choices in ((32, (3, 4, 5, 6)), (64, (2, 3)))
        for stages in stage_choices
        for touch in (2, 4, 6, 8)
        for early in (False, True)
    ]
    touched += [
        vary(wide, block_k=bk, num_stages=stages, prefetch=True, touch=6)
        for bk, stage_choices in ((32, (3, 4, 6)), (64, (2, 3, 4)))
        for stages in stage_choices
    ]
    final = [
        vary(plain, block_k=32, num_stages=stages, prefetch=True, touch=6, early_rows=early, order=order)
        for stages in (3, 4, 5)
        for early in (False, True)
        for order in ("groups", "tokens")
    ]
    final64 = [
        vary(small, block_tokens=bn, num_warps=w, block_k=bk, num_stages=s, prefetch=True, touch=6, early_rows=early)
        for bn, w in ((256, 4), (128, 4), (128, 2))
        for bk, s in ((16, 6), (32, 3), (32, 4), (32, 5), (32, 6), (64, 2), (64, 3))
        for early in (False, True)
    ]  # fmt: skip
    flipped = [
        Variant(block_rows=br, block_tokens=16, block_k=bk, num_stages=s, num_warps=w, prefetch=True, flip=flip,
                early_rows=early)
        for flip in (True, False)
        for br, w in ((16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))
        for bk, s in ((128, 3), (128, 4), (256, 2), (256, 3), (512, 2))
        for early in (True,)
        if br * bk * s * 2 <= 160 * 1024
    ]  # fmt: skip
    pipelines = [
        vary(plain, block_k=bk, num_stages=stages, x=x, values=values, order=order)
        for bk, stages in ((32, 7), (32, 9), (64, 3), (64, 5), (64, 7))
        for x in ("rows", "tiles")
        for values in ("pv", "vk")
        for order in ("groups", "tokens")
    ]
    pipelines += [vary(plain, num_stages=5, flip=True), vary(plain, block_k=32, num_stages=7, flip=True)]
    pipelines += [vary(plain, num_stages=5, evict=e) for e in ("evict_last", "evict_first")]
    pipelines += [
        vary(wide, block_k=bk, num_stages=s, prefetch=p)
        for bk, s, p in ((32, 7, False), (32, 9, False), (64, 4, False), (64, 5, False), (64, 6, False), (64, 7, False))
    ]
    short = [
        vary(plain, block_rows=br, block_tokens=bn, num_warps=w, block_k=bk, num_stages=stages, early_rows=early,
             order=order)
        for br, bn, w in ((128, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
        for bk, stages in ((32, 4), (32, 6), (64, 2), (64, 3), (64, 5))
        for early in (False, True)
        for order in ("groups", "tokens")
    ]  # fmt: skip
    wide_tokens = [
        vary(wide, op="token_major", num_stages=5, transpose=t)
        for t in ("xla", "triton", "triton32", "triton128", "triton128x64", "triton256", "triton32x32")
    ]
    return {
        "layout": [(square, [*dense, *layout])],
        "tiles": [(square, [*dense, *tiles])],
        "v64": [(Case(4096, 4096, 4096, group_size=64), [*dense, *v64])],
        "backward": [(square, [*dense, *backward])],
        "decode": [
            (mlp, [*dense, *decode(16)]),
            (dataclasses.replace(mlp, n=1), [*dense, *vectors, *decode(1, (32, 64))]),
            (dataclasses.replace(mlp, n=8), [*dense, *decode(8, (32, 64))]),
            (Case(4096, 4096, 16), [*dense, *decode(16)]),
        ],
        "occupancy": [(square, [*dense, *occupancy])],
        "dynamic": [(square, [*dense, *ragged])],
        "sparsity": [(dataclasses.replace(square, sparsity=q), [*dense, *best]) for q in (0.5, 0.875)],
        "narrow": [(Case(4096, 4096, 4096, group_size=64), [*dense, *narrow])],
        "token_major": [(square, [*dense, *tokens])],
        "mlp": [
            (Case(14336, 4096, 4096), [*dense, *best, *(vary(b, order="tokens") for b in best)]),
            (Case(4096, 14336, 4096), [*dense, *best, *(vary(b, order="tokens") for b in best)]),
            (Case(3072, 768, 8192), [*dense, *best, *(vary(b, order="tokens") for b in best)]),
        ],
        "touch": [(square, [*dense, *touched])],
        "final": [
            *(
                (case, [*dense, *final, *(vary(b, bounds="dynamic") for b in final)])
                for case in (
                    square,
                    dataclasses.replace(square, sparsity=0.5),
                    dataclasses.replace(square, sparsity=0.875),
                    Case(14336, 4096, 4096),
                    Case(4096, 14336, 4096),
                    Case(3072, 768, 8192),
                )
            ),
            (Case(4096, 4096, 4096, group_size=64), [*dense, *final64]),
            (square, [*dense, *(vary(t, block_k=32, num_stages=4, touch=6) for t in tokens)]),
            (Case(4096, 4096, 16), [*dense, *flipped]),
        ],
        "pipeline": [
            (case, [*dense, *pipelines])
            for case in (square, dataclasses.replace(square, sparsity=0.5), Case(14336, 4096, 4096))
        ],
        "short": [
            (case, [*dense, *short]) for case in (Case(3072, 768, 8192), dataclasses.replace(square, sparsity=0.875))
        ],
        "token_tiles": [
            (
                square,
                [
                    *dense,
                    *(
                        vary(w, early_rows=e, transpose=t)
                        for w in wide_tokens[:1]
                        for e in (False, True)
                        for t in ("xla",)
                    ),
                ],
            ),
            (
                dataclasses.replace(square, sparsity=0.875),
                [
                    *dense,
                    *(
                        vary(wide, block_k=bk, num_stages=st, early_rows=True, order=order)
                        for order in ("groups", "tokens")
                        for bk, st in (
                            (64, 3),
                            (64, 4),
                            (64, 5),
                            (64, 6),
                            (64, 7),
                            (64, 8),
                            (64, 9),
                            (128, 3),
                            (128, 4),
                        )
                    ),
                ],
            ),
        ],
        "wide_tokens": [(square, [*dense, *wide_tokens])],
        "decode2": [(Case(4096, 4096, 16), [*dense, *decode2])],
        "small": [
            (dataclasses.replace(mlp, n=64), [*dense, *decode(64, (32, 64, 128))]),
            (dataclasses.replace(mlp, n=256), [*dense, *decode(256, (32, 64, 128))]),
        ],
    }
