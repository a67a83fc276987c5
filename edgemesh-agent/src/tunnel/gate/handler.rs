//! One connection before the gate: nothing but the hello passes until the peer is known to be a member.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use either::Either;
use futures::{AsyncReadExt as _, AsyncWriteExt as _, future::BoxFuture};
use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol,
    core::upgrade::ReadyUpgrade,
    swarm::{
        ConnectionHandler, ConnectionHandlerEvent, SubstreamProtocol,
        handler::{
            ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound, ListenUpgradeError,
            OutboundUpgradeSend, SendWrapper, StreamUpgradeError,
        },
    },
};

use super::{
    super::{
        NodeName,
        identity::NotMember,
        secure::Pass,
        wire::{self, Hello},
    },
    Rules,
};

const HELLO: StreamProtocol = StreamProtocol::new("/edgemesh/hello/1");

/// How long a relayed connection on which nothing runs is kept, so that a hole can be punched meanwhile.
const RELAYED_LINGER: Duration = Duration::from_secs(30);

/// Why a connection is cut off.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum Refusal {
    #[error("{0}")]
    NotMember(#[from] NotMember),
    #[error("it claims a name that no node can have")]
    Name,
    #[error("it did not say in time who it is")]
    Silent,
    #[error("it ended the exchange of names ({0}); if it should be a member: is the PSK the same on both?")]
    Broken(std::io::Error),
    #[error("it speaks another protocol")]
    Foreign,
}

impl Refusal {
    /// For rate limits.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::NotMember(NotMember::Identity) => "identity",
            Self::NotMember(NotMember::NotAllowed) => "not allowed",
            Self::Name => "name",
            Self::Silent => "silent",
            Self::Broken(_) => "broken",
            Self::Foreign => "foreign",
        }
    }
}

/// What the handler tells the behaviour.
#[derive(Debug)]
pub(in super::super) enum FromHandler<E> {
    /// The peer is a member: `node`, which may be reached at `addresses` too.
    Member {
        node: NodeName,
        addresses: Vec<Multiaddr>,
        run: u64,
    },
    Refused {
        claimed: Option<NodeName>,
        why: Refusal,
    },
    Inner(E),
}

/// What all handlers of a gate have in common.
pub(super) struct Shared {
    pub(super) rules: Rules,
    pub(super) hello: Hello,
}

enum Step {
    /// The peer's hello has come; the stream goes on if it is accepted.
    Heard(Box<Stream>, Hello),
    /// The last word has been said.
    Done,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Nobody knows yet who the peer is.
    Closed,
    /// The peer is a member, and may not know yet that we are: it may open streams, we do not.
    HalfOpen,
    Open,
    Refused,
}

pub(in super::super) struct Handler<H: ConnectionHandler> {
    inner: H,
    shared: Arc<Shared>,
    peer: PeerId,
    /// Whether this side speaks first: the one that has the dialler's part in the handshake.
    first: bool,
    relayed: bool,
    state: State,
    asked: bool,
    opened: Option<Instant>,
    deadline: Pin<Box<tokio::time::Sleep>>,
    exchange: Option<BoxFuture<'static, std::io::Result<Step>>>,
    /// Held from when the peer is known to be a member.
    pass: Option<Pass>,
    events: VecDeque<FromHandler<H::ToBehaviour>>,
}

impl<H: ConnectionHandler> Handler<H> {
    pub(super) fn new(inner: H, shared: Arc<Shared>, peer: PeerId, first: bool, relayed: bool) -> Self {
        let deadline = Box::pin(tokio::time::sleep(shared.rules.deadline));
        Self {
            inner,
            shared,
            peer,
            first,
            relayed,
            state: State::Closed,
            asked: false,
            opened: None,
            deadline,
            exchange: None,
            pass: None,
            events: VecDeque::new(),
        }
    }

    fn refuse(&mut self, claimed: Option<NodeName>, why: Refusal) {
        if !matches!(self.state, State::Refused | State::Open) {
            self.state = State::Refused;
            self.exchange = None;
            self.events.push_back(FromHandler::Refused { claimed, why });
        }
    }

    /// The hello stream is there: whoever speaks first says his name.
    fn on_stream(&mut self, mut stream: Stream) {
        let (first, hello) = (self.first, self.shared.hello.clone());
        if self.state != State::Closed || self.exchange.is_some() {
            return;
        }
        self.exchange = Some(Box::pin(async move {
            if first {
                wire::write(&mut stream, &hello).await?;
            }
            let theirs = wire::read(&mut stream).await?;
            Ok(Step::Heard(Box::new(stream), theirs))
        }));
    }

    fn on_hello(&mut self, mut stream: Box<Stream>, theirs: Hello) {
        let Ok(node) = theirs.node.parse::<NodeName>() else { return self.refuse(None, Refusal::Name) };
        if let Err(why) = self.shared.rules.membership.check(&node, &self.peer) {
            return self.refuse(Some(node), why.into());
        }
        self.pass = Some(self.shared.rules.admitted.enter(self.peer));
        let run = theirs.run;
        let addresses =
            theirs.addresses.into_iter().take(wire::MAX_ADDRESSES).filter_map(|a| a.try_into().ok()).collect();
        self.events.push_back(FromHandler::Member { node, addresses, run });
        let hello = self.shared.hello.clone();
        if self.first {
            // The other side waits for this end of ours before it opens streams of its own: so none of them comes
            // before we accept them.
            self.open();
            self.exchange = Some(Box::pin(async move {
                stream.close().await?;
                Ok(Step::Done)
            }));
        } else {
            self.state = State::HalfOpen;
            self.exchange = Some(Box::pin(async move {
                wire::write(&mut *stream, &hello).await?;
                match stream.read(&mut [0]).await? {
                    0 => Ok(Step::Done),
                    _ => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "more than a hello")),
                }
            }));
        }
    }

    fn open(&mut self) {
        self.state = State::Open;
        self.opened = Some(Instant::now());
    }

    fn poll_exchange(&mut self, cx: &mut Context<'_>) {
        while let Some(exchange) = &mut self.exchange {
            let Poll::Ready(step) = exchange.as_mut().poll(cx) else { return };
            self.exchange = None;
            match step {
                Ok(Step::Heard(stream, hello)) => self.on_hello(stream, hello),
                Ok(Step::Done) if self.state == State::HalfOpen => self.open(),
                Ok(Step::Done) => {}
                Err(error) => self.refuse(None, Refusal::Broken(error)),
            }
        }
    }
}

type Hellos = SendWrapper<ReadyUpgrade<StreamProtocol>>;
type Inbound<H> = Either<Hellos, SendWrapper<<H as ConnectionHandler>::InboundProtocol>>;
type Outbound<H> = Either<Hellos, SendWrapper<<H as ConnectionHandler>::OutboundProtocol>>;

impl<H: ConnectionHandler> ConnectionHandler for Handler<H> {
    type FromBehaviour = H::FromBehaviour;
    type ToBehaviour = FromHandler<H::ToBehaviour>;
    type InboundProtocol = Inbound<H>;
    type OutboundProtocol = Outbound<H>;
    type InboundOpenInfo = Either<(), H::InboundOpenInfo>;
    type OutboundOpenInfo = Either<(), H::OutboundOpenInfo>;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, Self::InboundOpenInfo> {
        match self.state {
            State::Open | State::HalfOpen => self
                .inner
                .listen_protocol()
                .map_upgrade(|upgrade| Either::Right(SendWrapper(upgrade)))
                .map_info(Either::Right),
            State::Closed | State::Refused => {
                SubstreamProtocol::new(Either::Left(SendWrapper(ReadyUpgrade::new(HELLO))), Either::Left(()))
                    .with_timeout(self.shared.rules.deadline)
            }
        }
    }

    fn connection_keep_alive(&self) -> bool {
        match self.opened {
            // Until then the deadline decides.
            None => self.state != State::Refused,
            // Hole punching would keep it for ever. Streams that are open are counted elsewhere.
            Some(opened) if self.relayed => opened.elapsed() < RELAYED_LINGER,
            Some(_) => self.inner.connection_keep_alive(),
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        self.poll_exchange(cx);
        if matches!(self.state, State::Closed | State::HalfOpen) && self.deadline.as_mut().poll(cx).is_ready() {
            self.refuse(None, Refusal::Silent);
        }
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(event));
        }
        if self.first && !self.asked {
            self.asked = true;
            let hello = SendWrapper(ReadyUpgrade::new(HELLO));
            let protocol =
                SubstreamProtocol::new(Either::Left(hello), Either::Left(())).with_timeout(self.shared.rules.deadline);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        if self.state != State::Open {
            return Poll::Pending;
        }
        self.inner.poll(cx).map(|event| {
            event
                .map_custom(FromHandler::Inner)
                .map_protocol(|protocol| Either::Right(SendWrapper(protocol)))
                .map_outbound_open_info(Either::Right)
        })
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Option<Self::ToBehaviour>> {
        self.inner.poll_close(cx).map(|event| event.map(FromHandler::Inner))
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        // What waits in the inner handler goes nowhere before the gate is open.
        self.inner.on_behaviour_event(event);
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<
            '_,
            Self::InboundProtocol,
            Self::OutboundProtocol,
            Self::InboundOpenInfo,
            Self::OutboundOpenInfo,
        >,
    ) {
        if let Some(event) = self.take_hello(event) {
            self.inner.on_connection_event(event);
        }
    }
}

type Event<'a, H> = ConnectionEvent<
    'a,
    <H as ConnectionHandler>::InboundProtocol,
    <H as ConnectionHandler>::OutboundProtocol,
    <H as ConnectionHandler>::InboundOpenInfo,
    <H as ConnectionHandler>::OutboundOpenInfo,
>;

impl<H: ConnectionHandler> Handler<H> {
    /// Keeps what is about the hello, gives back what is for the inner handler.
    fn take_hello<'a>(&mut self, event: Event<'a, Self>) -> Option<Event<'a, H>> {
        use ConnectionEvent as E;
        use futures::future::Either as Out;
        match event {
            E::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, info }) => match (protocol, info) {
                (Out::Left(stream), _) => {
                    if !self.first {
                        self.on_stream(stream);
                    }
                    None
                }
                (Out::Right(protocol), Either::Right(info)) => {
                    Some(E::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol, info }))
                }
                (Out::Right(_), Either::Left(())) => None,
            },
            E::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }) => match (protocol, info) {
                (Out::Left(stream), _) => {
                    self.on_stream(stream);
                    None
                }
                (Out::Right(protocol), Either::Right(info)) => {
                    Some(E::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }))
                }
                (Out::Right(_), Either::Left(())) => None,
            },
            E::DialUpgradeError(DialUpgradeError { info, error }) => match info {
                Either::Left(()) => {
                    self.refuse(
                        None,
                        match error {
                            StreamUpgradeError::Timeout => Refusal::Silent,
                            StreamUpgradeError::Io(error) => Refusal::Broken(error),
                            StreamUpgradeError::NegotiationFailed | StreamUpgradeError::Apply(_) => Refusal::Foreign,
                        },
                    );
                    None
                }
                Either::Right(info) => {
                    Some(E::DialUpgradeError(DialUpgradeError { info, error: outbound_error::<H>(error)? }))
                }
            },
            E::ListenUpgradeError(ListenUpgradeError { info, error }) => match (info, error) {
                (Either::Right(info), Either::Right(error)) => {
                    Some(E::ListenUpgradeError(ListenUpgradeError { info, error }))
                }
                (Either::Left(()), _) | (_, Either::Left(_)) => None,
            },
            E::AddressChange(change) => Some(E::AddressChange(change)),
            E::LocalProtocolsChange(change) => Some(E::LocalProtocolsChange(change)),
            E::RemoteProtocolsChange(change) => Some(E::RemoteProtocolsChange(change)),
            _ => None,
        }
    }
}

type UpgradeError<P> = <P as OutboundUpgradeSend>::Error;

/// The same error with the half of the type that can be.
fn outbound_error<H: ConnectionHandler>(
    error: StreamUpgradeError<UpgradeError<Outbound<H>>>,
) -> Option<StreamUpgradeError<UpgradeError<H::OutboundProtocol>>> {
    match error {
        StreamUpgradeError::Timeout => Some(StreamUpgradeError::Timeout),
        StreamUpgradeError::NegotiationFailed => Some(StreamUpgradeError::NegotiationFailed),
        StreamUpgradeError::Io(error) => Some(StreamUpgradeError::Io(error)),
        StreamUpgradeError::Apply(Either::Right(error)) => Some(StreamUpgradeError::Apply(error)),
        StreamUpgradeError::Apply(Either::Left(never)) => match never {},
    }
}
