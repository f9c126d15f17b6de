"""Is the measuring protocol right about what it measures?"""
