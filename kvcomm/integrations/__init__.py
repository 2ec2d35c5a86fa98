"""kvcomm inside engines that its users run already.

Each folder loads only beside the program that it is for; nothing else in the package imports it.
"""
