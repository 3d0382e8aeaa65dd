"""What a policy sees and answers, and the policies there are."""
