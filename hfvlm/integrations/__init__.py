"""Small adapters to what others have: mteb, lmms-eval, VLMEvalKit, sentence-transformers, vLLM and SGLang.

Each module imports its neighbour, and nothing else in hfvlm imports these modules.
"""
