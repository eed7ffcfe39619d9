"""What each method's paper claims; the laws that all share are in test_contract.py."""
