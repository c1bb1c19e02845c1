//! The operations, by LMCache's integer ids and by name.

/// What a message asks for. LMCache's ids are those of LMCache 0.5.3 and later; operations whose
/// name begins with `kvferry.` have no id, and are sent only to a server whose `get_experimental`
/// reply holds [`EXTENSION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Hashes a prompt, counts the leading chunks that are there, and leases them.
    Lookup,
    /// The count of a lookup, once; nothing while it runs.
    QueryPrefetchStatus,
    /// The count of a lookup, waited for.
    WaitPrefetchStatus,
    /// Gives back leases of a lookup.
    FreeLookupLocks,
    /// The end of a request.
    EndSession,
    /// Registers an engine's layout (`register_kv_cache_engine_driven_context`).
    Register,
    /// Forgets an engine (`unregister_kv_cache_engine_driven_context`).
    Unregister,
    /// Reserves slots to write.
    PrepareStore,
    /// Makes written slots visible.
    CommitStore,
    /// Names slots to read.
    PrepareRetrieve,
    /// Ends a read.
    CommitRetrieve,
    /// Empties the cache.
    Clear,
    /// Tokens of a chunk.
    GetChunkSize,
    /// A sign of life.
    Ping,
    /// vLLM's block allocations, for observers.
    ReportBlockAllocation,
    /// Answered by "OK".
    Noop,
    /// Names of what the server can beside the table.
    GetExperimental,
    /// kvferry: boot token, version and process of the server; replies to a connection that asked
    /// carry generations from then on.
    Hello,
    /// kvferry: gives back what `prepare_store` reserved.
    AbandonStore,
    /// kvferry: whether slots still hold the generations that were granted.
    Confirm,
    /// kvferry: drops objects whose bytes are not what was stored.
    Discard,
    /// kvferry: the server's counters.
    Status,
}

/// The name in a `get_experimental` reply that announces the `kvferry.` operations.
pub const EXTENSION: &str = "kvferry.v1";

impl Operation {
    /// All operations, in the order of their ids.
    pub const ALL: [Self; 22] = [
        Self::Lookup,
        Self::QueryPrefetchStatus,
        Self::WaitPrefetchStatus,
        Self::FreeLookupLocks,
        Self::EndSession,
        Self::Register,
        Self::Unregister,
        Self::PrepareStore,
        Self::CommitStore,
        Self::PrepareRetrieve,
        Self::CommitRetrieve,
        Self::Clear,
        Self::GetChunkSize,
        Self::Ping,
        Self::ReportBlockAllocation,
        Self::Noop,
        Self::GetExperimental,
        Self::Hello,
        Self::AbandonStore,
        Self::Confirm,
        Self::Discard,
        Self::Status,
    ];

    /// LMCache's integer for the operation; `None` for those that are sent by name only.
    pub const fn id(self) -> Option<u64> {
        Some(match self {
            Self::Lookup => 8,
            Self::QueryPrefetchStatus => 9,
            Self::WaitPrefetchStatus => 10,
            Self::FreeLookupLocks => 12,
            Self::EndSession => 13,
            Self::Register => 14,
            Self::Unregister => 15,
            Self::PrepareStore => 16,
            Self::CommitStore => 17,
            Self::PrepareRetrieve => 18,
            Self::CommitRetrieve => 19,
            Self::Clear => 20,
            Self::GetChunkSize => 21,
            Self::Ping => 22,
            Self::ReportBlockAllocation => 23,
            Self::Noop => 24,
            Self::GetExperimental => 32,
            Self::Hello | Self::AbandonStore | Self::Confirm | Self::Discard | Self::Status => {
                return None;
            }
        })
    }

    /// The operation's name, as it may stand in a message instead of the id.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::QueryPrefetchStatus => "query_prefetch_status",
            Self::WaitPrefetchStatus => "wait_prefetch_status",
            Self::FreeLookupLocks => "free_lookup_locks",
            Self::EndSession => "end_session",
            Self::Register => "register_kv_cache_engine_driven_context",
            Self::Unregister => "unregister_kv_cache_engine_driven_context",
            Self::PrepareStore => "prepare_store",
            Self::CommitStore => "commit_store",
            Self::PrepareRetrieve => "prepare_retrieve",
            Self::CommitRetrieve => "commit_retrieve",
            Self::Clear => "clear",
            Self::GetChunkSize => "get_chunk_size",
            Self::Ping => "ping",
            Self::ReportBlockAllocation => "report_block_allocation",
            Self::Noop => "noop",
            Self::GetExperimental => "get_experimental",
            Self::Hello => "kvferry.hello",
            Self::AbandonStore => "kvferry.abandon_store",
            Self::Confirm => "kvferry.confirm",
            Self::Discard => "kvferry.discard",
            Self::Status => "kvferry.status",
        }
    }

    /// The operation of this id.
    pub fn from_id(id: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.id() == Some(id))
    }

    /// The operation of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
