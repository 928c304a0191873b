//! How much memory there is, and how much is taken.

use std::fs;

/// A limit on the process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub limit_bytes: u64,
    /// What sets it, for messages.
    pub limit_from: &'static str,
}

impl Memory {
    /// The tightest of MAX_MEMORY_MB and the container's limit; none: no limit is known.
    pub fn limit(configured: Option<u64>) -> Option<Self> {
        let configured = configured.map(|limit_bytes| Self {
            limit_bytes,
            limit_from: "MAX_MEMORY_MB",
        });
        let container = cgroup_limit().map(|limit_bytes| Self {
            limit_bytes,
            limit_from: "the container's limit",
        });
        [configured, container]
            .into_iter()
            .flatten()
            .min_by_key(|m| m.limit_bytes)
    }

    /// Resident bytes of this process; 0 where the system does not say.
    pub fn resident_bytes() -> u64 {
        let pages = fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|s| s.split(' ').nth(1)?.parse::<u64>().ok());
        pages.unwrap_or(0) * 4096
    }
}

/// The limit of the innermost control group that has one, version 2 or 1.
fn cgroup_limit() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = |controller: &str| {
        own.lines()
            .find_map(|l| l.split_once(controller)?.1.strip_prefix(':'))
            .unwrap_or("/")
    };
    let mut limits = Vec::new();
    for (root, path, name) in [
        ("/sys/fs/cgroup", group("0:"), "memory.max"),
        (
            "/sys/fs/cgroup/memory",
            group(":memory"),
            "memory.limit_in_bytes",
        ),
    ] {
        // Inside a container the path may be the host's; its parents up to the root are tried as well.
        for ancestor in std::path::Path::new(path).ancestors() {
            let file = std::path::Path::new(root)
                .join(ancestor.strip_prefix("/").unwrap_or(ancestor))
                .join(name);
            limits.extend(
                fs::read_to_string(file)
                    .ok()
                    .and_then(|text| text.trim().parse::<u64>().ok()),
            );
        }
    }
    // Version 1 writes "no limit" as a number near 2^63.
    limits.into_iter().filter(|&l| l < 1 << 60).min()
}
