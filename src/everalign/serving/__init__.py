"""The gateway: other models' answers corrected as they pass, feedback kept, and made into what is learned next."""
