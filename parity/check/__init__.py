"""The check: are two models the same function, and if not, where and why?"""
