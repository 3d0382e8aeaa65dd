"""The loop itself: attach, the controller that a user holds, one update of the run."""
