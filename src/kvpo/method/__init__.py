"""The method as plain mathematics: tensors and numbers in, tensors and numbers out.

Read in this order: flow, routing, advantage, evidence, gibbs, kvpo, diagnostics. Nothing here depends on a
model, a configuration, a device or a file.

Shape letters used as name suffixes: G branches, P routed blocks, S solver steps, F frames of a block, C H W
latent channels, rows and columns, K reward components, R rows of a batch or slots of a route.
"""
