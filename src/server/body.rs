//! Bodies of answers: whole, or sent while they are being made.
//!
//! A stream that is dropped before it is finished ends with an error, so that a client can tell a cut answer from a
//! complete one. A stream waits for its reader, but not for ever.

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Pieces that may wait for the connection.
const PIECES_MAX: usize = 8;

/// What an answer says, and who is told when it has been said.
pub(super) struct Body {
    kind: Kind,
    /// Dropped with the body.
    guard: Option<super::request::OpenRequest>,
}

enum Kind {
    Whole(Option<Bytes>),
    Stream(mpsc::Receiver<Piece>),
}

enum Piece {
    Data(Bytes),
    End,
}

/// The other end of a streamed body.
pub(super) struct Sender {
    pieces: mpsc::Sender<Piece>,
    stall: Duration,
}

/// Nobody reads any more.
#[derive(Debug)]
pub(super) struct Gone;

/// The answer broke off.
#[derive(Debug, thiserror::Error)]
#[error("the answer could not be completed")]
pub(super) struct Broken;

impl Body {
    /// A body that is sent while it is being made. A reader that takes nothing for as long as `stall` counts as gone.
    pub(super) fn stream(stall: Duration) -> (Sender, Self) {
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let body = Self {
            kind: Kind::Stream(receiver),
            guard: None,
        };
        (Sender { pieces, stall }, body)
    }

    /// Keeps the request open for as long as its answer is.
    pub(super) fn keep(&mut self, guard: super::request::OpenRequest) {
        self.guard = Some(guard);
    }
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(bytes: T) -> Self {
        let bytes = bytes.into();
        Self {
            kind: Kind::Whole(Some(bytes).filter(|b| !b.is_empty())),
            guard: None,
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::from(Bytes::new())
    }
}

impl Sender {
    /// # Errors
    /// The reader has left, or takes nothing.
    pub(super) async fn send(&mut self, bytes: impl Into<Bytes>) -> Result<(), Gone> {
        self.piece(Piece::Data(bytes.into())).await
    }

    /// Says that nothing is missing.
    pub(super) async fn finish(&mut self) {
        let _ = self.piece(Piece::End).await;
    }

    /// Resolves when the reader has left.
    pub(super) async fn closed(&self) {
        self.pieces.closed().await;
    }

    async fn piece(&mut self, piece: Piece) -> Result<(), Gone> {
        match timeout(self.stall, self.pieces.send(piece)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Gone),
        }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = &mut *self;
        let bytes = match &mut this.kind {
            Kind::Whole(bytes) => bytes.take(),
            Kind::Stream(pieces) => match ready!(pieces.poll_recv(context)) {
                Some(Piece::Data(bytes)) => Some(bytes),
                Some(Piece::End) => {
                    this.kind = Kind::Whole(None);
                    None
                }
                None => {
                    this.kind = Kind::Whole(None);
                    if let Some(guard) = &mut this.guard {
                        guard.broken();
                    }
                    return Poll::Ready(Some(Err(Broken)));
                }
            },
        };
        if let (Some(bytes), Some(guard)) = (&bytes, &mut this.guard) {
            guard.sent(bytes.len());
        }
        if let (Kind::Whole(None), Some(guard)) = (&this.kind, &mut this.guard) {
            guard.complete();
        }
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.kind, Kind::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64))
            }
            Kind::Stream(_) => SizeHint::default(),
        }
    }
}
