"""The tests of zarrcache. A package, so that spawned processes can import functions defined
here.
"""
