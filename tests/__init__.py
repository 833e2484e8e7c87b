"""The tests of zarrcache. A package, so that spawned processes can import the functions they are
given.
"""
