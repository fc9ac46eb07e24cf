"""Single-device torch: no rank, no engine, no configuration object.

Shapes: B batch, C channels, H W pixels, h w patch grid, L = h*w tokens, K kept tokens, D width, P = patch_size² * C.
"""
